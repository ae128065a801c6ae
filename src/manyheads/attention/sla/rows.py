"""Padded rows with their real tokens moved to the front, so that blocks are formed of these.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.ragged import Compaction, check_mask, compact

__all__ = ["Rows"]


class Rows:
    """Queries, keys and values, widened, with the real tokens of each row at its front.

    What stands behind them is 0. ``lengths`` counts the real queries and keys, (B) both, or is
    None twice: blocks are then full but for the last.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        query_mask: Tensor | None,
    ) -> None:
        batch, _, queries, _ = query.shape
        keys = key.shape[2]
        mask = check_mask(mask, batch, keys)
        if query_mask is None and queries == keys:
            query_mask = mask
        query_mask = check_mask(query_mask, batch, queries)
        self.dtype = query.dtype
        work = torch.promote_types(query.dtype, torch.float32)
        self.query, self.key, self.value = (t.to(work) for t in (query, key, value))
        self.lengths: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
        self.front: Tensor | None = None  # (B, M) real keys
        if mask is None and query_mask is None:
            return
        if mask is None:
            mask = query.new_ones(batch, keys, dtype=torch.bool)
        if query_mask is None:
            query_mask = query.new_ones(batch, queries, dtype=torch.bool)
        self.lengths = query_mask.sum(1), mask.sum(1)
        self.moved, moved = compact(query_mask), compact(mask)
        self.answered = query_mask & mask.any(1, keepdim=True)
        self.front = moved.front
        self.query = _front(self.query, self.moved)
        self.key, self.value = _front(self.key, moved), _front(self.value, moved)

    def back(self, out: Tensor) -> Tensor:
        """Return an output to the places and the dtype of the queries; padded ones are 0."""
        if self.front is not None:
            out = self.moved.scatter(out, dim=2)
            out = out.masked_fill(~self.answered[:, None, :, None], 0)
        return out.to(self.dtype)


def _front(x: Tensor, moved: Compaction) -> Tensor:
    return moved.gather(x, dim=2).masked_fill(~moved.front[:, None, :, None], 0)
