"""Block-sparse attention as a public function, and by its definition.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.attention.block_sparse.lowering import as_block_mask
from manyheads.attention.block_sparse.mask import BlockMask
from manyheads.attention.block_sparse.mods import ScoreMod
from manyheads.attention.block_sparse.op import attend_visits
from manyheads.attention.block_sparse.scored import attend_scored
from manyheads.layers.blocks import block_count
from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = ["block_sparse", "block_sparse_reference"]


def block_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any = None,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over the blocks of a mask, in the language of FlexAttention.

    Exact over the pairs that the mask lets pass. Time in proportion to the blocks that hold such
    pairs; no N x M tensor, forward or backward. Without ``score_mod``, in float32 on a CPU, it is
    a compiled kernel; with it, PyTorch over a few blocks of queries at a time.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        block_mask: from :func:`create_block_mask`, or a BlockMask of
            ``torch.nn.attention.flex_attention``; None: every pair.
        score_mod: (score, b, h, q_idx, kv_idx) -> score, over tensors that broadcast against each
            other, on scaled scores before the mask. Gradients reach the tensors that it closes
            over or names, or that a module or partial holds. Computed again in backward.
        scale: factor on the scores, D ** -0.5 unless given.

    Returns:
        (B, H, N, V) in the dtype of ``query``; a query without any key gives 0.

    Raises:
        ValueError: shapes do not fit each other or the mask.

    Example:
        >>> q, k, v = torch.randn(3, 1, 2, 200, 16)
        >>> mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 200, 200)
        >>> out = block_sparse(q, k, v, mask, score_mod=lambda s, b, h, i, j: s - 0.1 * (i - j))
        >>> out.shape
        torch.Size([1, 2, 200, 16])
    """
    mask = _checked(query, key, value, block_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(work) for t in (query, key, value))
    block_q, block_k = mask.block_size
    with torch.autocast(query.device.type, enabled=False):
        if score_mod is None:
            out, _ = attend_visits(q * scale, k, v, mask.visits, block_q=block_q, block_k=block_k)
        else:
            out = attend_scored(
                q * scale, k, v, mask.visits, score_mod, block_q=block_q, block_k=block_k
            )
    return out.to(query.dtype)


def block_sparse_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any = None,
    *,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention under the mask through N x M matrices: the oracle of the tests.

    Arguments as :func:`block_sparse`.
    """
    mask = _checked(query, key, value, block_mask).to_dense()
    heads = query.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ repeat_kv(key, heads).mT * scale
    if score_mod is not None:
        b, h, q_idx, kv_idx = (
            torch.arange(n, device=query.device).view(-1, *(1,) * (3 - i))
            for i, n in enumerate(scores.shape)
        )
        scores = score_mod(scores, b, h, q_idx, kv_idx)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0)  # NaN where there is no key
    return weights @ repeat_kv(value, heads)


def _checked(query: Tensor, key: Tensor, value: Tensor, block_mask: Any) -> BlockMask:
    check_qkv(query, key, value)
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if block_mask is None:
        there = (1, 1, block_count(queries, 64), block_count(keys, 64))
        every = torch.ones(there, dtype=torch.bool, device=query.device)
        return BlockMask.from_block_map(every, queries, keys)
    mask = as_block_mask(block_mask, queries, keys)
    device = mask.visits.offsets.device
    if query.device.type not in (device.type, "meta"):
        raise ValueError(
            f"block_mask is on {device}, query on {query.device}: use "
            f"block_mask.to({str(query.device)!r})"
        )
    for axis, own, given in zip(("batch", "heads"), mask.shape[:2], (batch, heads), strict=True):
        if own not in (1, given):
            raise ValueError(
                f"{axis} of block_mask is {own}, of query {given}: make it for {given}"
            )
    for axis, own, given in zip(("queries", "keys"), mask.shape[2:], (queries, keys), strict=True):
        if own != given:
            raise ValueError(
                f"block_mask is for {own} {axis}, there are {given}: make one for this length"
            )
    return mask
