"""Calls of the block-sparse kernels over shapes that are apt to go wrong; for sanitizers too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manyheads.attention import block_sparse, causal_mask, create_block_mask, sla
from manyheads.attention import sliding_window_mask as window

# batch, heads, key heads, queries, keys, head dim, value dim, block_q, block_k
SHAPES = (
    (1, 1, 1, 1, 1, 1, 1, 1, 1),
    (2, 4, 2, 63, 63, 20, 17, 16, 16),
    (1, 2, 1, 70, 70, 33, 64, 32, 20),
    (1, 3, 3, 129, 129, 64, 5, 64, 48),
    (2, 2, 2, 40, 40, 16, 16, 7, 13),
    (0, 2, 1, 20, 20, 8, 8, 16, 16),
)


def calls() -> Iterator[None]:
    """Do one call after another."""
    for batch, heads, kv, queries, keys, dim, value_dim, block_q, block_k in SHAPES:
        sizes = ((heads, queries, dim), (kv, keys, dim), (kv, keys, value_dim))
        leaves = [torch.randn(batch, *s).requires_grad_() for s in sizes]
        for mod in (causal_mask, window(9)):
            mask = create_block_mask(mod, None, None, queries, keys, (block_q, block_k))
            block_sparse(*leaves, mask).square().sum().backward()
            yield
        real = None if not batch else torch.arange(keys) < torch.randint(1, keys + 1, (batch, 1))
        out = sla(*leaves, topk=0.4, block_q=block_q, block_k=block_k, mask=real)
        out.square().sum().backward()
        yield
