"""Block masks: which blocks of keys a block of queries meets, wholly or in part.

B batch, H heads, N queries, M keys, P query blocks, Q key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse.picture import block_text, draw_block_map
from manyheads.attention.block_sparse.visits import Visits
from manyheads.layers.blocks import block_count

__all__ = ["BlockMask", "listed", "size_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMask:
    """The blocks of an attention matrix that are computed; ``create_block_mask`` makes it.

    Attributes:
        visits: lists of key blocks of each query block, and the bits of those that count in part.
        queries, keys: N and M.
        block_size: tokens of a query block and of a key block.
    """

    visits: Visits
    queries: int
    keys: int
    block_size: tuple[int, int]

    @classmethod
    def from_block_map(
        cls, block_map: Tensor, queries: int, keys: int, block_size: int | tuple[int, int] = 64
    ) -> BlockMask:
        """Take a map (B, H, P, Q) of bool, True = the whole block is attended to.

        Raises:
            ValueError: the map has other axes than the lengths and the block size ask for.

        Example:
            >>> there = torch.eye(2, dtype=torch.bool)[None, None]
            >>> BlockMask.from_block_map(there, 100, 100).sparsity
            0.5
        """
        size = size_of(block_size)
        expected = (block_count(queries, size[0]), block_count(keys, size[1]))
        if block_map.ndim != 4 or block_map.shape[2:] != expected:
            raise ValueError(
                f"block_map has shape {tuple(block_map.shape)}, expected (batch, heads, query "
                f"blocks, key blocks) = (..., {expected[0]}, {expected[1]}) for lengths {queries} "
                f"and {keys} in blocks of {size[0]} and {size[1]}"
            )
        return cls(visits=listed(block_map), queries=queries, keys=keys, block_size=size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, M); B and H are 1 where all share the mask."""
        return self.visits.batch, self.visits.heads, self.queries, self.keys

    @property
    def sparsity(self) -> float:
        """Share of the blocks that are not computed."""
        everything = self.block_map().numel()
        return 1.0 - len(self.visits.columns) / everything if everything else 0.0

    def block_map(self) -> Tensor:
        """Return (B, H, P, Q) int8: 1 for whole blocks, 0 for parts of blocks, -1 for none."""
        rows, blocks = (
            block_count(n, s) for n, s in zip(self.shape[2:], self.block_size, strict=True)
        )
        visits = self.visits
        found = torch.full(
            (visits.batch * visits.heads * rows, blocks), -1, dtype=torch.int8,
            device=visits.columns.device,
        )  # fmt: skip
        row = torch.arange(len(found), device=found.device).repeat_interleave(visits.offsets.diff())
        kind = torch.ones_like(visits.columns, dtype=torch.int8)
        if visits.which is not None:
            kind = (visits.which < 0).to(torch.int8)
        found[row, visits.columns] = kind
        return found.view(visits.batch, visits.heads, rows, blocks)

    def to_dense(self) -> Tensor:
        """Return the mask itself, (B, H, N, M) bool: for looking at short sequences."""
        size_q, size_k = self.block_size
        visits = self.visits
        rows, blocks = block_count(self.queries, size_q), block_count(self.keys, size_k)
        whole = torch.zeros(
            visits.batch * visits.heads * rows, blocks, size_q, size_k, dtype=torch.bool,
            device=visits.columns.device,
        )  # fmt: skip
        row = torch.arange(len(whole), device=whole.device).repeat_interleave(visits.offsets.diff())
        bits = torch.ones(len(row), size_q, size_k, dtype=torch.bool, device=whole.device)
        if visits.which is not None and visits.bits is not None:
            partial = visits.which >= 0
            bits[partial] = visits.bits[visits.which[partial]]
        whole[row, visits.columns] = bits
        whole = whole.view(visits.batch, visits.heads, rows, blocks, size_q, size_k)
        return whole.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, : self.queries, : self.keys]

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the mask on another device."""
        v = self.visits
        which, bits = (None if t is None else t.to(device) for t in (v.which, v.bits))
        moved = Visits(v.offsets.to(device), v.columns.to(device), v.batch, v.heads, which, bits)
        return replace(self, visits=moved)

    def draw(self, path: str | PathLike[str] | None = None, *, cell: int = 6) -> NDArray[np.uint8]:
        """Draw the blocks, dark whole and light in part, and write a PNG if given a path.

        Returns the picture (height, width, 3); see :func:`manyheads.attention.draw_block_map`.
        """
        return draw_block_map(self.block_map(), path=path, cell=cell)

    def __str__(self) -> str:
        return block_text(self.block_map())


def size_of(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Return tokens of a query block and of a key block.

    Raises:
        ValueError: not one or two numbers from 1.
    """
    size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"block_size {block_size}: give tokens a block, one or two numbers from 1")
    return int(size[0]), int(size[1])


def listed(there: Tensor) -> Visits:
    """Return the lists of a map (B, H, P, Q) of bool."""
    offsets = F.pad(there.sum(3).flatten().cumsum(0), (1, 0))
    return Visits(offsets, there.nonzero()[:, 3], there.shape[0], there.shape[1])
