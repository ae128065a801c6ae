"""A memory of key-value blocks of any size, from which the best few are fetched.

B batch, H query heads, H_kv key heads, T new tokens, S stored blocks, k fetched blocks, L block
with its landmark, D and V head dims.
"""

from __future__ import annotations

import copy
from os import PathLike
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from manyheads.attention.landmark.definition import check_block_size
from manyheads.attention.landmark.select import best_blocks, grouped_scores, turn
from manyheads.attention.landmark.store import BlockStore
from manyheads.errors import unknown_name
from manyheads.layers.heads import repeat_kv

__all__ = ["LandmarkMemory", "Retrieved"]

Selection = Literal["per_token_and_head", "max_over_heads", "max_over_tokens"]
Positions = Literal["stingy", "exact"]
_SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")
_POSITIONS = ("stingy", "exact")


class Retrieved(NamedTuple):
    """Blocks that queries fetched, in the order of their age.

    ``block`` (B, H, T or 1, k): their numbers in the stream. ``scores`` (B, H, T, k, L): of all
    their keys, the landmark's last, scaled. ``values`` (B, H, T or 1, k, L, V). The third axis is
    1 where all tokens share the blocks.
    """

    block: Tensor
    scores: Tensor
    values: Tensor


class LandmarkMemory:
    """Key-value blocks of one layer's stream, and retrieval by landmark. Lossy: k blocks a query.

    Equal to attention to the whole stream where ``top_k`` covers all stored blocks. Blocks lie on
    ``storage_device`` or in files; landmark keys alone stay with the model. All rows of a batch
    read streams of one length. Nothing is differentiated. 2305.16300.

    Args:
        block_size: L; a landmark ends every block of the stream.
        top_k: blocks that a query fetches; fewer while fewer are stored. Ties: the newest.
        capacity: blocks that are kept, the newest; None: all.
        selection: whether each token and head fetches its own blocks, each token by its best head,
            or each head by the best token of a chunk (fastest).
        positions: "stingy" places the newest ``top_k`` blocks where they are and all older ones
            just before, so that no position exceeds (top_k + 1) · L and a chunk; "exact" keeps the
            stream's own positions, beyond what a model was trained on.
        rotary_theta, rotary_interleaved: the layer's rotary embedding; None for none.
        storage_device: where blocks lie (None: with the model).
        path: a folder for files of keys and values, mapped into memory; needs ``capacity``.
        official_start: place queries as the lm_benchmark code does: with exactly ``top_k`` blocks
            stored they overlap the newest. For parity only.

    Raises:
        ValueError: an option is unknown or out of range.

    Example:
        >>> memory = LandmarkMemory(block_size=10, top_k=2, rotary_theta=None)
        >>> memory.append(torch.randn(1, 4, 35, 16), torch.randn(1, 4, 35, 16))
        >>> memory.stored, memory.retrieve(torch.randn(1, 4, 5, 16)).values.shape
        (3, torch.Size([1, 4, 5, 2, 10, 16]))
    """

    def __init__(
        self,
        *,
        block_size: int,
        top_k: int,
        capacity: int | None = None,
        selection: Selection = "per_token_and_head",
        positions: Positions = "stingy",
        rotary_theta: float | None = 10000.0,
        rotary_interleaved: bool = False,
        storage_device: torch.device | str | None = None,
        path: str | PathLike[str] | None = None,
        official_start: bool = False,
    ) -> None:
        check_block_size(block_size)
        if top_k < 1:
            raise ValueError(f"top_k {top_k} must be at least 1")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity {capacity} must be at least 1 block, or None")
        if selection not in _SELECTIONS:
            raise unknown_name("selection", selection, _SELECTIONS)
        if positions not in _POSITIONS:
            raise unknown_name("positions", positions, _POSITIONS)
        self.block_size, self.top_k, self.capacity = block_size, top_k, capacity
        self.selection, self.positions = selection, positions
        self.rotary_theta, self.rotary_interleaved = rotary_theta, rotary_interleaved
        self.official_start = official_start
        self.seen = 0
        self.tail: tuple[Tensor, Tensor] | None = None
        self._blocks = BlockStore(capacity, storage_device, path)
        self._gates = BlockStore(capacity, None, None)

    @property
    def stored(self) -> int:
        """Blocks that are held."""
        return self.seen if self.capacity is None else min(self.seen, self.capacity)

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The places of blocks: keys and values (S, B, H_kv, L, D and V), by number modulo S; then
        the turned keys of their landmarks and the lengths of these."""
        return *self._blocks.tensors, *self._gates.tensors

    @property
    def tail_length(self) -> int:
        """Tokens behind the last whole block."""
        return 0 if self.tail is None else self.tail[0].shape[2]

    @property
    def start(self) -> int:
        """Position of the next token."""
        if self.positions == "exact":
            slots = self.seen
        elif self.official_start:
            slots = min(self.seen, self.top_k + 1)
        else:
            slots = self.top_k + 1 if self.seen else 0
        return slots * self.block_size + self.tail_length

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> None:
        """Put the next tokens of the stream behind those that are held.

        Args:
            key: (B, H_kv, T, D), before any rotary embedding; value: (B, H_kv, T, V).

        Raises:
            ValueError: batch, heads or head dim differ from what is held.
        """
        if self.tail is not None:
            for name, new, old in zip(("key", "value"), (key, value), self.tail, strict=True):
                if (*new.shape[:2], new.shape[3]) != (*old.shape[:2], old.shape[3]):
                    raise ValueError(
                        f"{name} has shape {tuple(new.shape)}, the memory holds (batch, heads, "
                        f"length, head_dim) = ({old.shape[0]}, {old.shape[1]}, *, {old.shape[3]})"
                    )
            key, value = (
                torch.cat((o, n.to(o)), 2) for o, n in zip(self.tail, (key, value), strict=True)
            )
        size = self.block_size
        count = key.shape[2] // size
        blocks = tuple(
            t[:, :, : count * size].unflatten(2, (count, size)).permute(2, 0, 1, 3, 4)
            for t in (key, value)
        )  # (blocks, B, H_kv, L, D)
        self.tail = (key[:, :, count * size :].clone(), value[:, :, count * size :].clone())
        if count:
            places = torch.full((count,), size - 1, device=key.device)
            if self.positions == "exact":
                places += torch.arange(self.seen, self.seen + count, device=key.device) * size
            gates = self._turn(blocks[0][:, :, :, -1], places[:, None, None])
            self._blocks.write(self.seen, *blocks)
            # Lengths bound what rounding may change in a score.
            self._gates.write(self.seen, gates, gates.norm(dim=-1))
            self.seen += count

    def retrieve(self, query: Tensor) -> Retrieved:
        """Fetch the best blocks for the next tokens (B, H, T, D), before any rotary embedding.

        Raises:
            ValueError: no whole block is stored.
        """
        return self.fetch(query, self.select(query))

    @torch.no_grad()
    def select(self, query: Tensor) -> Tensor:
        """Return the numbers of the blocks to fetch, oldest first: (B, H, T or 1, k)."""
        if not self.stored:
            raise ValueError("the memory holds no whole block yet: append tokens first")
        scores, slack = self._landmark_scores(query)
        if self.selection != "per_token_and_head":
            axis = 1 if self.selection == "max_over_heads" else 2
            scores = scores.log_softmax(-1).amax(axis, keepdim=True)
            slack = slack.amax(axis, keepdim=True)
        best = best_blocks(scores, min(self.top_k, self.stored), slack).sort(-1).values
        return (best + self.seen - self.stored).expand(-1, query.shape[1], -1, -1)

    @torch.no_grad()
    def fetch(self, query: Tensor, block: Tensor, *, offset: int = 0) -> Retrieved:
        """Fetch chosen blocks; ``offset``: tokens of the chunk before these queries."""
        size, heads, dim = self.block_size, query.shape[1], query.shape[3]
        within = torch.arange(size, device=query.device)[None, None, None]
        rows = torch.arange(query.shape[0], device=query.device)[:, None, None, None]
        kv = torch.arange(heads, device=query.device)[None, :, None, None]
        if block.shape[2] == 1:  # each is fetched once or nearly so
            keys, values = self._blocks.pick(block, rows, kv, query.device)
            keys = self._turn(keys.to(_wide(query)), within)
        else:
            numbers, place = block.unique(return_inverse=True)
            keys, values = self._blocks.read(numbers, query.device)  # (blocks, B, H_kv, L, D)
            keys = self._turn(keys.to(_wide(query)), within)
            kv = kv // (heads // keys.shape[2])
            keys, values = keys[place, rows, kv], values[place, rows, kv]
        # (B, H, T or 1, k, L, D)
        at = self._query_places(query, offset)[:, None]  # (T, 1)
        turned = self._turn(query[:, :, :, None].to(keys), at - self._base(block))
        if block.shape[2] == 1:
            scores = (turned.transpose(2, 3) @ keys[:, :, 0].mT).transpose(2, 3)
        else:
            scores = (keys @ turned[..., None]).squeeze(-1)
        return Retrieved(block, scores * dim**-0.5, values)

    def reset(self) -> None:
        """Forget everything; files and tensors are used again."""
        self.seen, self.tail = 0, None

    def clone(self) -> Self:
        """Return an independent copy, to branch from; of a memory in files the copy lies in RAM."""
        other = copy.copy(self)
        other._blocks, other._gates = self._blocks.clone(), self._gates.clone()
        other.tail = None if self.tail is None else (self.tail[0].clone(), self.tail[1].clone())
        return other

    def reorder(self, index: Tensor) -> None:
        """Select and repeat batch rows, as beam search does: row i becomes old row ``index[i]``."""
        self._blocks.reorder(index)
        self._gates.reorder(index)
        if self.tail is not None:
            key, value = (t.index_select(0, index.to(t.device)) for t in self.tail)
            self.tail = (key, value)

    def turn_chunk(
        self, query: Tensor, key: Tensor, *, relative: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rotate the next tokens' queries (B, H, T, D), and the tail's and their keys together.

        ``relative``: to places counted from the tail's first token. Among themselves only
        distances matter, and small angles are more exact.
        """
        if self.tail is not None:
            key = torch.cat((self.tail[0].to(key), key), 2)
        first = 0 if relative else self.start - self.tail_length
        begin = first + self.tail_length
        queries = torch.arange(begin, begin + query.shape[2], device=query.device)
        keys = torch.arange(first, first + key.shape[2], device=key.device)
        return self._turn(query, queries[None, None]), self._turn(key, keys[None, None])

    def _query_places(self, query: Tensor, offset: int) -> Tensor:
        first = self.start + offset
        return torch.arange(first, first + query.shape[2], device=query.device)

    def _base(self, block: Tensor) -> Tensor:
        """Return the position of each fetched block's first key."""
        if self.positions == "exact":
            return block * self.block_size
        count = block.shape[-1]
        rank = torch.arange(self.top_k - count, self.top_k, device=block.device)
        return (rank + (block >= self.seen - self.top_k)) * self.block_size

    def _landmark_scores(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, H, T, S), oldest block first, and (B, H, T, 1), what rounding may change.

        Scaled, float32 at least.
        """
        wide = _wide(query)
        gates, lengths = self._gates.last(self.stored, self.seen)  # (S, B, H_kv, D)
        gates, at = gates.to(wide).permute(1, 2, 3, 0), self._query_places(query, 0)
        q = query.to(wide)
        scores = grouped_scores(self._turn(q, at[None, None]), gates)
        if self.positions == "stingy":
            # The newest blocks stand at slots of their own; it is the query that is turned back.
            newest = min(self.top_k, self.stored)
            slots = torch.arange(self.top_k - newest + 1, self.top_k + 1, device=q.device)
            moved = self._turn(q[:, :, :, None], at[:, None] - slots * self.block_size)
            own = repeat_kv(gates[..., -newest:].mT, q.shape[1])[:, :, None]  # (B, H, 1, newest, D)
            scores[..., -newest:] = (moved * own).sum(-1)
        longest = lengths.to(wide).amax(0)[..., None, None]  # (B, H_kv, 1, 1)
        slack = q.norm(dim=-1, keepdim=True) * repeat_kv(longest, q.shape[1])
        scale = query.shape[-1] ** -0.5
        return scores * scale, slack * (8 * torch.finfo(wide).eps * scale)

    def _turn(self, x: Tensor, places: Tensor | int) -> Tensor:
        return turn(x, places, theta=self.rotary_theta, interleaved=self.rotary_interleaved)


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)
