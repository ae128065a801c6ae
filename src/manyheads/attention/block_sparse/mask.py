"""Block masks: which blocks of keys a block of queries meets, wholly or in part.

B batch, H heads, N queries, M keys, P query blocks, Q key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse.mods import MaskMod
from manyheads.attention.block_sparse.picture import block_text, draw_block_map
from manyheads.attention.block_sparse.visits import Visits
from manyheads.layers.blocks import block_count

__all__ = ["BlockMask", "as_block_mask", "create_block_mask"]

_EVALUATED = 1 << 22  # pairs of positions at once
_PARTIAL, _FULL = 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockMask:
    """The blocks of an attention matrix that are computed; made by :func:`create_block_mask`.

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
        size = _size(block_size)
        expected = (block_count(queries, size[0]), block_count(keys, size[1]))
        if block_map.ndim != 4 or block_map.shape[2:] != expected:
            raise ValueError(
                f"block_map has shape {tuple(block_map.shape)}, expected (batch, heads, query "
                f"blocks, key blocks) = (..., {expected[0]}, {expected[1]}) for lengths {queries} "
                f"and {keys} in blocks of {size[0]} and {size[1]}"
            )
        return cls(visits=_listed(block_map), queries=queries, keys=keys, block_size=size)

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


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    block_size: int | tuple[int, int] = 64,
    *,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Ask a mask_mod about all pairs of positions and keep the blocks where it lets some pass.

    The pairs are asked for a few query blocks at a time, so that no N x M tensor is made; of
    blocks that are alike the bits are kept once.

    Args:
        mask_mod: (b, h, q_idx, kv_idx) -> bool, over integer tensors that broadcast against each
            other (FlexAttention's are usually written so). It must not depend on anything that
            changes between this call and the attention.
        B, H: batch and heads, or None where the mask is the same for all of them.
        Q_LEN, KV_LEN: lengths of queries and keys.
        block_size: tokens a block, or those of a query block and of a key block.
        device: where the mask is made and used.

    Raises:
        ValueError: a size below its least, or a mask_mod that returns no booleans.

    Example:
        >>> mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 200, 200)
        >>> mask.shape, mask.sparsity
        ((1, 1, 200, 200), 0.375)
    """
    size = _size(block_size)
    for name, given, least in (
        ("B", B, 1),
        ("H", H, 1),
        ("Q_LEN", Q_LEN, 0),
        ("KV_LEN", KV_LEN, 0),
    ):
        if given is not None and given < least:
            raise ValueError(f"{name} {given} must be at least {least}")
    batch, heads = B or 1, H or 1
    rows, blocks = block_count(Q_LEN, size[0]), block_count(KV_LEN, size[1])
    kinds = torch.zeros(batch, heads, rows, blocks, dtype=torch.int8, device=device)
    which = torch.full(kinds.shape, -1, dtype=torch.long, device=device)
    pool = _Pool(size)
    for part, allowed in _strips(mask_mod, batch, heads, Q_LEN, KV_LEN, size, device):
        counts = allowed.sum((3, 5), dtype=torch.int32)  # (B, H, R, Q)
        kinds[:, :, part] = _PARTIAL * (counts > 0)
        kinds[:, :, part].masked_fill_(counts == _pairs(part, Q_LEN, KV_LEN, size, device), _FULL)
        partial = kinds[:, :, part] == _PARTIAL
        which[:, :, part][partial] = pool.add(allowed.transpose(3, 4)[partial])
    visits = _listed(kinds > 0)
    if len(pool):
        visits = visits._replace(which=which[kinds > 0], bits=pool.bits())
    return BlockMask(visits=visits, queries=Q_LEN, keys=KV_LEN, block_size=size)


def as_block_mask(mask: Any, queries: int, keys: int) -> BlockMask:
    """Return ours, or the same mask from one of ``torch.nn.attention.flex_attention``.

    Raises:
        ValueError: something else.
    """
    if isinstance(mask, BlockMask):
        return mask
    names = ("kv_num_blocks", "kv_indices", "mask_mod", "BLOCK_SIZE")
    if not all(hasattr(mask, n) for n in names):
        raise ValueError(
            f"block_mask is a {type(mask).__name__}: give a BlockMask, ours or that of "
            "torch.nn.attention.flex_attention"
        )
    size = _size(mask.BLOCK_SIZE)
    batch, heads = mask.kv_num_blocks.shape[:2]
    rows, blocks = block_count(queries, size[0]), block_count(keys, size[1])
    device = mask.kv_indices.device
    kinds = torch.zeros(batch, heads, rows, blocks + 1, dtype=torch.int8, device=device)
    for kind, numbers, indices in (
        (_FULL, getattr(mask, "full_kv_num_blocks", None), getattr(mask, "full_kv_indices", None)),
        (_PARTIAL, mask.kv_num_blocks, mask.kv_indices),
    ):
        if numbers is None or indices is None:
            continue
        if indices.shape[2] < rows:
            raise ValueError(
                f"block_mask has {indices.shape[2]} query blocks of {size[0]}, the queries "
                f"{rows}: make it for length {queries}"
            )
        there = torch.arange(indices.shape[3], device=device) < numbers[:, :, :rows, None]
        # Behind its count a list holds anything: that goes to a column which is cut off.
        place = indices[:, :, :rows].long().clamp(max=blocks).masked_fill(~there, blocks)
        kinds.scatter_(3, place, kind)
    kinds = kinds[..., :blocks]
    visits = _listed(kinds > 0)
    b, h, row, column = (kinds == _PARTIAL).nonzero(as_tuple=True)
    which = torch.full(kinds.shape, -1, dtype=torch.long, device=device)
    pool = _Pool(size)
    step = max(1, _EVALUATED // (size[0] * size[1]))
    for part in (slice(i, i + step) for i in range(0, len(b), step)):
        sample, head, i, j = (t[part, None, None] for t in (b, h, row, column))
        q_idx = i * size[0] + torch.arange(size[0], device=device)[:, None]
        kv_idx = j * size[1] + torch.arange(size[1], device=device)
        inside = (q_idx < queries) & (kv_idx < keys)
        asked = (sample, head, q_idx.clamp(max=queries - 1), kv_idx.clamp(max=keys - 1))
        bits = inside & mask.mask_mod(*asked)
        which[b[part], h[part], row[part], column[part]] = pool.add(bits)
    if len(pool):
        visits = visits._replace(which=which[kinds > 0], bits=pool.bits())
    return BlockMask(visits=visits, queries=queries, keys=keys, block_size=size)


class _Pool:
    """Bits of blocks, alike ones kept once."""

    def __init__(self, size: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._size = size
        self._factors = torch.randint(1 << 62, (size[0] * size[1],), generator=generator)
        self._places: dict[int, int] = {}
        self._bits: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._bits)

    def add(self, bits: Tensor) -> Tensor:
        """Take (n, block_q, block_k); return the number of each."""
        # Sums of random factors, modulo 2**64: two different blocks meet once in 2**62 pairs.
        factors = self._factors.to(bits.device)
        sums = torch.cat(
            [(b.flatten(1) * factors).sum(1) for b in bits.split(256)] or [factors[:0]]
        )
        names, inverse = sums.unique(return_inverse=True)
        first = torch.full_like(names, len(sums)).scatter_reduce(
            0, inverse, torch.arange(len(sums), device=bits.device), "amin"
        )
        numbers = []
        for name, place in zip(names.tolist(), first.tolist(), strict=True):
            if name not in self._places:
                self._places[name] = len(self._bits)
                self._bits.append(bits[place].clone())
            numbers.append(self._places[name])
        return torch.tensor(numbers, dtype=torch.long, device=bits.device)[inverse]

    def bits(self) -> Tensor:
        return torch.stack(self._bits)


def _size(block_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"block_size {block_size}: give tokens a block, one or two numbers from 1")
    return int(size[0]), int(size[1])


def _listed(there: Tensor) -> Visits:
    offsets = F.pad(there.sum(3).flatten().cumsum(0), (1, 0))
    return Visits(offsets, there.nonzero()[:, 3], there.shape[0], there.shape[1])


def _pairs(
    part: slice, queries: int, keys: int, size: tuple[int, int], device: torch.device | str
) -> Tensor:
    """Return how many pairs of real positions the blocks of some rows hold, (R, Q)."""
    row = torch.arange(part.start, part.stop, device=device)
    column = torch.arange(block_count(keys, size[1]), device=device)
    down = (queries - row * size[0]).clamp(max=size[0])
    return down[:, None] * (keys - column * size[1]).clamp(max=size[1])


def _strips(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    size: tuple[int, int],
    device: torch.device | str,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of blocks and what the mask lets pass, (B, H, R, block_q, Q, block_k)."""
    rows, blocks = block_count(queries, size[0]), block_count(keys, size[1])
    if not rows or not blocks:
        return
    step = max(1, _EVALUATED // (batch * heads * size[0] * keys))
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    kv_idx = torch.arange(keys, device=device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        stop = min(part.stop * size[0], queries)
        q_idx = torch.arange(start * size[0], stop, device=device)[:, None]
        allowed = mask_mod(b, h, q_idx, kv_idx)
        if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
            raise ValueError("mask_mod returned no boolean tensor: compare positions, as q >= kv")
        allowed = allowed.expand(batch, heads, len(q_idx), keys)
        missing = (0, blocks * size[1] - keys, 0, part.stop * size[0] - stop)
        allowed = F.pad(allowed, missing) if any(missing) else allowed
        yield part, allowed.unflatten(3, (blocks, size[1])).unflatten(2, (-1, size[0]))
