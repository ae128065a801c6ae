"""Which key blocks each query block meets, as lists of different lengths.

B batch, H heads, P query blocks, Q key blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Turned", "Visits", "turn"]


class Visits(NamedTuple):
    """The lists of all query blocks, one behind the other.

    Attributes:
        offsets: (B · H · P + 1) where each list begins.
        columns: (visits) key blocks; Q and above are blocks without tokens.
        batch, heads: B and H of the lists, each 1 where they are shared.
        which: (visits) the mask of a visit among ``bits``, or -1 for a whole block; None: all are.
        bits: (masks, block_q, block_k) bool, True = may attend.
    """

    offsets: Tensor
    columns: Tensor
    batch: int
    heads: int
    which: Tensor | None = None
    bits: Tensor | None = None

    @classmethod
    def from_table(cls, table: Tensor) -> Visits:
        """Take a table (B, H, P, n) of key blocks: n for each query block."""
        batch, heads, rows, width = table.shape
        offsets = torch.arange(batch * heads * rows + 1, device=table.device) * width
        return cls(offsets, table.flatten(), batch, heads)


class Turned(NamedTuple):
    """Visits by key block: ``starts`` (B · H · Q + 1) in ``visits``; ``sources``, query blocks."""

    starts: Tensor
    visits: Tensor
    sources: Tensor


def turn(visits: Visits, blocks: int) -> Turned:
    """Return for each of Q key blocks its visits, in the order of the lists."""
    offsets, columns, lists = visits.offsets, visits.columns, visits.batch * visits.heads
    rows = max(1, (len(offsets) - 1) // max(1, lists))
    row = torch.arange(len(offsets) - 1, device=columns.device)
    row = row.repeat_interleave(offsets.diff(), output_size=len(columns))
    there = (columns < blocks).nonzero()[:, 0]  # blocks without tokens get no visits
    row = row[there]
    owner = row.div(rows, rounding_mode="floor") * blocks + columns[there]
    owner, order = owner.sort(stable=True)
    starts = torch.searchsorted(owner, torch.arange(lists * blocks + 1, device=owner.device))
    return Turned(starts, there[order], row[order] % rows)
