"""Calls of lean's kernels over shapes that are apt to go wrong; for sanitizers too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manyheads.attention import lean, lean_packed, lean_paged

# lengths, query heads, key heads, queries, head dim, value dim
SHAPES = (
    ((1,), 1, 1, 1, 1, 1),
    ((70, 3, 0, 129), 8, 2, 1, 20, 33),
    ((33, 64), 6, 1, 3, 80, 16),
    ((300,), 32, 4, 1, 128, 128),
    ((5, 260), 4, 4, 2, 63, 1),
)


def calls() -> Iterator[None]:
    """Do one call after another."""
    for lengths, heads, kv, queries, dim, value_dim in SHAPES:
        count = torch.tensor(lengths)
        batch, most = len(lengths), max(lengths)
        for dtype in (torch.float32, torch.bfloat16):
            q = torch.randn(batch, heads, queries, dim)
            k = torch.randn(batch, kv, most, dim).to(dtype)
            v = torch.randn(batch, kv, most, value_dim).to(dtype)
            for workers in (1, 3, 7):
                with torch.no_grad():
                    lean(q, k, v, lengths=count, workers=workers, tile=16, return_lse=True,
                         is_causal=queries > 1 and min(lengths) >= queries)  # fmt: skip
                yield
            borders = torch.cat((torch.zeros(1, dtype=torch.long), count.cumsum(0)))
            flat_k, flat_v = (
                torch.cat([t[i, :, :n].transpose(0, 1) for i, n in enumerate(lengths)])
                for t in (k, v)
            )
            with torch.no_grad():
                lean_packed(q, flat_k, flat_v, borders, workers=3)
            yield
            page = 8
            pages = -(-most // page)
            table = torch.randperm(batch * pages).view(batch, pages)
            store_k, store_v = (
                torch.randn(batch * pages, kv, page, n).to(dtype) for n in (dim, value_dim)
            )
            with torch.no_grad():
                lean_paged(q, store_k, store_v, table, count, workers=3)
            yield
