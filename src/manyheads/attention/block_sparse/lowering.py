"""From functions of positions, or a mask of FlexAttention, to lists of blocks and their bits.

B batch, H heads, N queries, M keys, P query blocks, Q key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse.mask import BlockMask, listed, size_of
from manyheads.attention.block_sparse.mods import MaskMod
from manyheads.layers.blocks import block_count

__all__ = ["as_block_mask", "create_block_mask"]

_EVALUATED = 1 << 18  # pairs of positions at once: what a mask_mod makes of them stays in cache
_PARTIAL, _FULL = 1, 2


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
    size = size_of(block_size)
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
    whole = _pairs(Q_LEN, KV_LEN, size, device)
    for down, across, allowed in _tiles(mask_mod, batch, heads, Q_LEN, KV_LEN, size, device):
        counts = _counts(allowed)  # (B, H, R, C)
        kind = kinds[:, :, down, across]
        kind.copy_(_PARTIAL * (counts > 0)).masked_fill_(counts == whole[down, across], _FULL)
        partial = kind == _PARTIAL
        if bool(partial.any()):
            bits = allowed.transpose(3, 4)[partial]
            which[:, :, down, across][partial] = pool.add(bits)
    visits = listed(kinds > 0)
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
    size = size_of(mask.BLOCK_SIZE)
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
    visits = listed(kinds > 0)
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


def _pairs(queries: int, keys: int, size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Return how many pairs of real positions each block holds, (P, Q)."""
    row = torch.arange(block_count(queries, size[0]), device=device)
    column = torch.arange(block_count(keys, size[1]), device=device)
    down = (queries - row * size[0]).clamp(max=size[0])
    return down[:, None] * (keys - column * size[1]).clamp(max=size[1])


def _counts(allowed: Tensor) -> Tensor:
    """Return how many of (B, H, R, block_q, C, block_k) are True in each block."""
    if allowed.shape[3] > 255 or allowed.shape[5] % 8:
        return allowed.sum((3, 5), dtype=torch.int32)
    # Eight bytes at a time: no byte overflows in a sum of up to 255 ones.
    words = allowed.contiguous().view(torch.int64).sum(3)
    return words.view(torch.uint8).sum(4, dtype=torch.int32)


def _tiles(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    size: tuple[int, int],
    device: torch.device | str,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows and columns of blocks and what the mask lets pass there.

    That is (B, H, R, block_q, C, block_k) for R rows and C columns, False beyond the lengths.
    """
    rows, columns = block_count(queries, size[0]), block_count(keys, size[1])
    blocks = max(1, _EVALUATED // (batch * heads * size[0] * size[1]))
    wide = max(1, min(blocks, columns))
    high = max(1, blocks // wide)
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    for top in range(0, rows, high):
        down = slice(top, min(top + high, rows))
        q_idx = _positions(down, size[0], queries, device)[:, None]
        for left in range(0, columns, wide):
            across = slice(left, min(left + wide, columns))
            kv_idx = _positions(across, size[1], keys, device)
            allowed = mask_mod(b, h, q_idx, kv_idx)
            if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
                raise ValueError(
                    "mask_mod returned no boolean tensor: compare positions, as q >= kv"
                )
            allowed = allowed.expand(batch, heads, len(q_idx), len(kv_idx))
            high_now, wide_now = down.stop - top, across.stop - left
            missing = wide_now * size[1] - len(kv_idx), high_now * size[0] - len(q_idx)
            if any(missing):
                allowed = F.pad(allowed, (0, missing[0], 0, missing[1]))
            cut = allowed.unflatten(3, (wide_now, size[1])).unflatten(2, (high_now, size[0]))
            yield down, across, cut


def _positions(blocks: slice, size: int, length: int, device: torch.device | str) -> Tensor:
    return torch.arange(blocks.start * size, min(blocks.stop * size, length), device=device)
