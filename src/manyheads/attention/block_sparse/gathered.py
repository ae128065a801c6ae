"""The PyTorch form: key blocks are gathered for a few query blocks at a time, as fit the cache.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks, R rows
of a chunk: query blocks of any sample and head, n the key blocks of the longest list among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse.visits import Visits
from manyheads.layers.blocks import block_count, cut, lengths_as_counts

__all__ = ["Chunk", "Gathered", "joined"]

_GATHERED_NUMBERS = 1 << 17  # of keys at once: half a megabyte stays in a core's cache


class Chunk(NamedTuple):
    """Some query blocks and what they meet.

    Attributes:
        rows: their numbers among B · H · P, a slice where they are neighbours.
        blocks: (R · n) numbers of key blocks in ``Gathered.key``.
        columns: (R, n) the same in each sequence; Q is a block without tokens.
        absent: True where a query does not attend, broadcasts to (R, block_q, n · block_k); None:
            nowhere.
    """

    rows: slice | Tensor
    blocks: Tensor
    columns: Tensor
    absent: Tensor | None


class Gathered:
    """Keys and values in blocks, and the chunks in which the lists ask for them.

    ``key`` and ``value`` are (B · H_kv · blocks, block_k, D and V). ``blocks`` is Q + 1: the last
    of each sequence is a block without tokens, which shorter lists are filled up with.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visits: Visits,
        lengths: Tensor | None,
        block_q: int,
        block_k: int,
    ) -> None:
        self.visits, self.block_k = visits, block_k
        self.batch, self.heads, queries, _ = query.shape
        kv_heads, keys = key.shape[1:3]
        self.rows = block_count(queries, block_q)
        self.blocks = block_count(keys, block_k) + 1
        self.key, self.value = (_blocks(t, block_k) for t in (key, value))
        rows = max(1, self.rows)
        row = torch.arange(self.batch * self.heads * self.rows, device=query.device)
        self.row = row % rows
        self.head = row // rows % max(1, self.heads)
        self.sample = row // (rows * max(1, self.heads))
        own = self.sample * kv_heads + self.head // (self.heads // kv_heads)
        self.first = own * self.blocks  # the first block of a row's keys
        place = self.sample * (visits.batch > 1) * visits.heads + self.head * (visits.heads > 1)
        self.list = place * self.rows + self.row
        counts = F.pad(lengths_as_counts(lengths, keys, block_k, key), (0, 1))
        places = torch.arange(block_k, device=key.device)
        absent = places >= counts.expand(self.batch, -1)[..., None]
        self.absent = absent.flatten(0, 1)  # (B · blocks, block_k)
        self.bits: Tensor | None = None
        if visits.bits is not None:
            self.bits = F.pad(visits.bits, (0, 0, 0, 0, 0, 1), value=True)

    def __iter__(self) -> Iterator[Chunk]:
        """Yield chunks, those with the longest lists first."""
        counts = self.visits.offsets.diff()[self.list]
        order = None
        if len(counts) and int(counts.min()) != int(counts.max()):
            counts, order = counts.sort(descending=True, stable=True)
        lengths, start = counts.tolist(), 0
        while start < len(lengths):
            width = max(1, lengths[start])
            numbers = width * self.block_k * max(1, self.key.shape[-1])
            stop = min(start + max(1, _GATHERED_NUMBERS // numbers), len(lengths))
            chosen = slice(start, stop)
            yield self._chunk(chosen if order is None else order[chosen], counts[chosen], width)
            start = stop

    def _chunk(self, rows: slice | Tensor, counts: Tensor, width: int) -> Chunk:
        places = torch.arange(width, device=counts.device)
        there = places < counts[:, None]  # (R, n)
        visit = (self.visits.offsets[self.list[rows]][:, None] + places) * there
        columns = torch.full_like(visit, self.blocks - 1)
        if len(self.visits.columns):
            columns = torch.where(there, self.visits.columns[visit], columns)
            columns = columns.clamp(max=self.blocks - 1)
        blocks = (columns + self.first[rows][:, None]).flatten()
        own = columns + self.sample[rows][:, None] * self.blocks
        absent = self.absent[own].flatten(1)[:, None]  # (R, 1, n · block_k)
        if self.bits is not None and self.visits.which is not None and len(self.visits.which):
            which = torch.where(there, self.visits.which[visit], -1)
            if bool((which >= 0).any()):
                bits = self.bits[which]  # -1 is the last: all True
                absent = absent | ~bits.transpose(1, 2).flatten(2)
        return Chunk(rows, blocks, columns, absent if bool(absent.any()) else None)

    def take(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return keys and values of a chunk, (R, n · block_k, D and V)."""
        shape = (chunk.columns.shape[0], chunk.columns.shape[1] * self.block_k)
        keys, values = (t.index_select(0, chunk.blocks) for t in (self.key, self.value))
        return keys.view(*shape, keys.shape[-1]), values.view(*shape, values.shape[-1])

    def whole(self, x: Tensor, like: Tensor) -> Tensor:
        """Return (B · H_kv · blocks, block_k, D) as (B, H_kv, M, D)."""
        y = x.view(*like.shape[:2], self.blocks * self.block_k, like.shape[3])
        return y[:, :, : like.shape[2]].contiguous()


def _blocks(x: Tensor, block: int) -> Tensor:
    return F.pad(cut(x, block), (0, 0, 0, 0, 0, 1)).flatten(0, 2)


def joined(x: Tensor, like: Tensor) -> Tensor:
    """(B · H · P, block, V) to (B, H, N, V), without what filled up the last block."""
    batch, heads, queries, _ = like.shape
    y = x.view(batch, heads, block_count(queries, x.shape[1]) * x.shape[1], x.shape[2])
    return y[:, :, :queries].contiguous()
