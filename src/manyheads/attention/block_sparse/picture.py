"""A block map as a picture and as text. P query blocks down, Q key blocks across."""

from __future__ import annotations

import struct
import zlib
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["block_text", "draw_block_map"]

_WHOLE, _PART, _NONE = (23, 55, 94), (168, 200, 228), (246, 246, 246)
_GAP = (255, 255, 255)
_SIGNS = "▒█·"  # by 0, 1, -1


def draw_block_map(
    block_map: Tensor, *, path: str | PathLike[str] | None = None, cell: int = 6
) -> NDArray[np.uint8]:
    """Draw block maps side by side: heads across, batch down. Needs no drawing library.

    Of ``BlockMask.block_map`` dark blocks are whole, light ones masked in part, near-white ones
    not computed; of ``sla_parts`` dark is critical (softmax), light linear, near-white neither.

    Args:
        block_map: (P, Q), (H, P, Q) or (B, H, P, Q) of 1, 0 and -1.
        path: where to write a PNG, or None.
        cell: pixels a block.

    Returns:
        The picture (height, width, 3), uint8.

    Raises:
        ValueError: other axes or values than these, or a cell below 1 pixel.

    Example:
        >>> draw_block_map(torch.eye(4, dtype=torch.int8), cell=2).shape
        (8, 8, 3)
    """
    if cell < 1:
        raise ValueError(f"cell {cell} must be at least 1 pixel")
    kinds = _kinds(block_map)
    colours = np.array((_PART, _WHOLE, _NONE), dtype=np.uint8)  # by 0, 1, -1
    large = kinds.repeat(cell, 2).repeat(cell, 3)
    batch, heads, height, width = large.shape
    picture = np.empty((batch * (height + cell) - cell, heads * (width + cell) - cell, 3), np.uint8)
    picture[:] = _GAP
    for b in range(batch):
        for h in range(heads):
            top, left = b * (height + cell), h * (width + cell)
            picture[top : top + height, left : left + width] = colours[large[b, h]]
    if path is not None:
        Path(path).write_bytes(_png(picture))
    return picture


def block_text(block_map: Tensor, *, width: int = 96) -> str:
    """Return block maps as text: █ whole, ▒ in part, · not computed.

    Args:
        block_map: as for :func:`draw_block_map`; several maps are written below each other.
        width: most characters a line. Larger maps have several blocks a character, which is ▒
            unless they are alike.

    Raises:
        ValueError: as :func:`draw_block_map`.

    Example:
        >>> print(block_text(torch.tensor([[1, -1], [1, 0]])))
        █·
        █▒
    """
    kinds = _kinds(block_map)
    batch, heads, height, across = kinds.shape
    step = max(1, -(-max(height, across) // max(width, 1)))
    parts = []
    for b in range(batch):
        for h in range(heads):
            if batch * heads > 1:
                parts.append(f"sample {b}, head {h}")
            for top in range(0, height, step):
                cells = (
                    kinds[b, h, top : top + step, i : i + step] for i in range(0, across, step)
                )
                parts.append(
                    "".join(_SIGNS[c.flat[0] if (c == c.flat[0]).all() else 0] for c in cells)
                )
    return "\n".join(parts)


def _kinds(block_map: Tensor) -> NDArray[np.int64]:
    if not 2 <= block_map.ndim <= 4:
        raise ValueError(
            f"block_map has {block_map.ndim} axes, expected (batch, heads, query blocks, key "
            "blocks) or its last two or three"
        )
    kinds: NDArray[np.int64] = block_map.detach().cpu().long().numpy()
    kinds = kinds.reshape((1,) * (4 - kinds.ndim) + kinds.shape)
    if not np.isin(kinds, (-1, 0, 1)).all():
        raise ValueError("block_map holds other values than 1, 0 and -1")
    return kinds


def _png(picture: NDArray[np.uint8]) -> bytes:
    height, width, _ = picture.shape
    lines = np.concatenate((np.zeros((height, 1), np.uint8), picture.reshape(height, -1)), 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            chunk(b"IEND", b""),
        )
    )
