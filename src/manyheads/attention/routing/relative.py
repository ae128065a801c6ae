"""Relative terms of attention on blocks of consecutive ranks, without a table for each pair.

I queries, J keys of one block; query i stands at rank i + shift, key j at rank j; distance =
key rank − query rank. Products with all distances are made once, (..., I, I + J), and skewed
into (..., I, J) by views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "RelativeTables",
    "block_table",
    "gather_by_distance",
    "named_tables",
    "skew",
    "spread_by_distance",
    "unskew",
]


_STD = 0.02


class RelativeTables(nn.Module):
    """Relative positions, one vector a distance −R to R, shared by heads: (2R + 1, D) each."""

    def __init__(self, reach: int, dim: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(2 * reach + 1, dim))
        self.value = nn.Parameter(torch.empty(2 * reach + 1, dim))
        for table in (self.key, self.value):
            nn.init.normal_(table, std=_STD)


def named_tables(tables: RelativeTables | None) -> dict[str, Any]:
    """Return tables as the arguments of functions, none for None."""
    if tables is None:
        return {}
    return {"relative_key": tables.key, "relative_value": tables.value}


def block_table(table: Tensor, queries: int, keys: int, shift: int) -> Tensor:
    """Return the rows of a table (2R + 1, D) by distance: (I + J, D), the last one unused."""
    reach = table.shape[0] // 2
    first = 1 - queries - shift
    distance = torch.arange(first, first + queries + keys, device=table.device)
    return table.index_select(0, distance.clamp(-reach, reach) + reach)


def skew(x: Tensor, keys: int) -> Tensor:
    """(..., I, I + J) by distance to (..., I, J) by key: y[i, j] = x[i, j − i + I − 1]."""
    queries, wide = x.shape[-2:]
    flat = x.flatten(-2)[..., queries - 1 : queries - 1 + queries * (wide - 1)]
    return flat.unflatten(-1, (queries, wide - 1))[..., :keys]


def unskew(x: Tensor) -> Tensor:
    """(..., I, J) by key to (..., I, I + J) by distance; the transpose of :func:`skew`."""
    queries, keys = x.shape[-2:]
    flat = F.pad(x, (0, queries - 1)).flatten(-2)
    return F.pad(flat, (queries - 1, 1)).unflatten(-1, (queries, queries + keys))


def gather_by_distance(q: Tensor, table: Tensor, distance: Tensor) -> Tensor:
    """Return q (..., I, D) · table row at each distance (..., I, J), for distances in no order."""
    reach = table.shape[0] // 2
    index = (distance.clamp(-reach, reach) + reach).expand(*q.shape[:-1], distance.shape[-1])
    return (q @ table.mT).gather(-1, index)


def spread_by_distance(weights: Tensor, table: Tensor, distance: Tensor) -> Tensor:
    """Return Σ_j weights (..., I, J) · table row at each distance: (..., I, D)."""
    reach = table.shape[0] // 2
    index = (distance.clamp(-reach, reach) + reach).expand(weights.shape)
    empty = weights.new_zeros(*weights.shape[:-1], table.shape[0])
    return empty.scatter_add(-1, index, weights) @ table
