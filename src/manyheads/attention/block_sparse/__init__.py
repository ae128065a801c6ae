"""Attention over blocks of keys that a mask leaves, and the core that other mechanisms share.

Masks and changes of scores are functions of positions, as in FlexAttention; they are lowered to
lists of whole and partial key blocks for each block of queries.
"""

from manyheads.attention.block_sparse.function import block_sparse, block_sparse_reference
from manyheads.attention.block_sparse.lowering import create_block_mask
from manyheads.attention.block_sparse.mask import BlockMask
from manyheads.attention.block_sparse.mods import (
    and_masks,
    causal_mask,
    document_mask,
    or_masks,
    prefix_lm_mask,
    sliding_window_mask,
)
from manyheads.attention.block_sparse.picture import block_text, draw_block_map

__all__ = [
    "BlockMask",
    "and_masks",
    "block_sparse",
    "block_sparse_reference",
    "block_text",
    "causal_mask",
    "create_block_mask",
    "document_mask",
    "draw_block_map",
    "or_masks",
    "prefix_lm_mask",
    "sliding_window_mask",
]
