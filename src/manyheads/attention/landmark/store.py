"""A ring of blocks on a device, or in files that are mapped into memory.

S blocks of any shape (B, ...), block first.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["BlockStore"]

_ROOM = 16  # least number of free places when a store grows


class BlockStore:
    """Blocks by their number in a stream; one past the capacity takes the place of the oldest.

    Args:
        capacity: blocks that are held; None grows without bound.
        device: where they lie (None: where the first ones came from).
        path: a folder for one file a tensor instead; needs ``capacity``.

    Raises:
        ValueError: a path without a capacity, or with another device than the CPU.
    """

    def __init__(
        self,
        capacity: int | None,
        device: torch.device | str | None,
        path: str | PathLike[str] | None,
    ) -> None:
        if path is not None and capacity is None:
            raise ValueError("path needs a capacity: a file has a size; pass capacity=blocks")
        if path is not None and device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"storage_device {device!r} with a path: files lie on the CPU")
        self.capacity, self.device = capacity, "cpu" if path is not None else device
        self.path = None if path is None else Path(path)
        self.tensors: list[Tensor] = []

    def write(self, first: int, *blocks: Tensor) -> None:
        """Put blocks (n, B, ...), whose numbers count from ``first``, into each tensor."""
        count = blocks[0].shape[0]
        self._make_room(first + count, blocks)
        kept = min(count, self.tensors[0].shape[0])
        numbers = torch.arange(first + count - kept, first + count) % self.tensors[0].shape[0]
        for held, new in zip(self.tensors, blocks, strict=True):
            held[numbers.to(held.device)] = new[count - kept :].to(held)

    def read(self, numbers: Tensor, device: torch.device) -> tuple[Tensor, ...]:
        """Return the blocks of these numbers (n,), (n, B, ...), on a device."""
        return tuple(
            held[(numbers % held.shape[0]).to(held.device)].to(device) for held in self.tensors
        )

    def last(self, count: int, seen: int) -> tuple[Tensor, ...]:
        """Return the last ``count`` of ``seen`` blocks, oldest first, (count, B, ...); views."""
        room = self.tensors[0].shape[0]
        first, stop = (seen - count) % room, (seen - 1) % room + 1
        if first < stop:
            return tuple(held[first:stop] for held in self.tensors)
        return tuple(torch.cat((held[first:], held[:stop])) for held in self.tensors)

    def pick(
        self, block: Tensor, row: Tensor, head: Tensor, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Return (B, H, T, k, ...) of blocks (B, H, T, k, B, H_kv, ...): a row and head of each.

        ``row`` and ``head`` broadcast to the blocks; each key head serves consecutive heads.
        """
        heads = self.tensors[0].shape[2]
        head = head // (block.shape[1] // heads)
        index = (block % self.tensors[0].shape[0] * self.tensors[0].shape[1] + row) * heads + head
        return tuple(
            held.flatten(0, 2)
            .index_select(0, index.flatten().to(held.device))
            .view(*block.shape, *held.shape[3:])
            .to(device)
            for held in self.tensors
        )

    def clone(self) -> BlockStore:
        """Return a copy that does not share memory or files."""
        other = BlockStore(self.capacity, self.device, None)
        other.tensors = [t.clone() for t in self.tensors]
        return other

    def reorder(self, index: Tensor) -> None:
        """Select and repeat rows of the batch; the new batch has the old one's size in files."""
        for i, held in enumerate(self.tensors):
            rows = held.index_select(1, index.to(held.device))
            if self.path is not None and rows.shape == held.shape:
                held.copy_(rows)
            else:
                self.tensors[i] = rows

    def _make_room(self, need: int, blocks: tuple[Tensor, ...]) -> None:
        if not self.tensors:
            size = self.capacity or max(need, _ROOM)
            self.tensors = [self._empty(i, size, b) for i, b in enumerate(blocks)]
        elif self.capacity is None and need > self.tensors[0].shape[0]:
            for i, held in enumerate(self.tensors):
                larger = self._empty(i, max(need, 2 * held.shape[0]), held)
                larger[: held.shape[0]] = held
                self.tensors[i] = larger

    def _empty(self, index: int, size: int, like: Tensor) -> Tensor:
        shape = (size, *like.shape[1:])
        if self.path is None:
            return like.new_zeros(shape, device=self.device or like.device)
        self.path.mkdir(parents=True, exist_ok=True)
        numbers = size * like[0].numel()
        file = str(self.path / f"{index}.bin")
        return torch.from_file(file, shared=True, size=numbers, dtype=like.dtype).view(shape)
