"""Which key blocks a query block attends to: pooled scores, three classes, a lookup table.

B batch, H heads, N queries, M keys, D head dim, P query blocks, Q key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.blocks import cut, lengths_as_counts
from manyheads.layers.heads import repeat_kv

__all__ = ["BlockRule", "Selection", "select"]


class BlockRule(NamedTuple):
    """How sequences are cut, and how key blocks are classed: shares critical and negligible."""

    topk: float
    negligible: float
    block_q: int
    block_k: int

    def critical_of(self, blocks: int) -> int:
        """Return how many of so many key blocks are critical: rounded down, at least one."""
        return max(1, min(blocks, int(self.topk * blocks)))

    def negligible_of(self, blocks: int) -> int:
        """Return how many of so many key blocks are negligible; a critical one never is."""
        return max(0, min(blocks - self.critical_of(blocks), int(self.negligible * blocks)))


class Selection(NamedTuple):
    """``block_map`` (B, H, P, Q) int8 and ``table`` (B, H, P, n), the critical key blocks.

    A table entry that a shorter row of the batch does not have is Q, a block without tokens.
    """

    block_map: Tensor
    table: Tensor


@torch.no_grad()
def select(
    query: Tensor, key: Tensor, rule: BlockRule, lengths: tuple[Tensor | None, Tensor | None]
) -> Selection:
    """Class the key blocks of each query block by the product of their means.

    Real tokens stand at the front of each row, ``lengths`` (B) of queries and keys or None for
    all; what stands behind is 0. Of equal scores the earlier block is taken. No gradient.
    """
    rows = lengths_as_counts(lengths[0], query.shape[2], rule.block_q, query)
    columns = lengths_as_counts(lengths[1], key.shape[2], rule.block_k, key)
    pooled_q, pooled_k = _means(query, rows, rule.block_q), _means(key, columns, rule.block_k)
    # Centred keys: the ranking is the same, but less of it is lost to a mean that all keys share.
    real = columns[:, None, :, None]
    centre = (pooled_k * real).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp_min(1)
    scores = pooled_q @ repeat_kv(pooled_k - centre, query.shape[1]).mT  # (B, H, P, Q)
    scores = scores.masked_fill(columns[:, None, None] == 0, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices

    blocks = scores.shape[-1]
    held = (columns > 0).sum(-1)[:, None, None, None]  # key blocks with tokens, a row
    critical = _lookup([rule.critical_of(n) for n in range(blocks + 1)], held)
    negligible = _lookup([rule.negligible_of(n) for n in range(blocks + 1)], held)
    rank = torch.arange(blocks, device=key.device)
    kind = (rank < critical).to(torch.int8) - (rank >= held - negligible).to(torch.int8)
    kind = kind.masked_fill(rank >= held, -1).masked_fill(rows[:, None, :, None] == 0, -1)
    block_map = torch.zeros_like(order, dtype=torch.int8)
    block_map = block_map.scatter(-1, order, kind.expand(order.shape))
    most = rule.critical_of(blocks)
    table = torch.where(kind[..., :most] == 1, order[..., :most], blocks)
    return Selection(block_map, table)


def _lookup(counts: list[int], index: Tensor) -> Tensor:
    return torch.tensor(counts, device=index.device)[index]


def _means(x: Tensor, counts: Tensor, block: int) -> Tensor:
    return cut(x, block).sum(3) / counts[:, None, :, None].clamp_min(1)
