"""Mix-token: a box of patch tokens is taken from another image of the batch.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
2104.10858, as VOLO uses it. B batch, h and w rows and columns of tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Box", "check_box", "mix_box", "mix_tokens"]


class Box(NamedTuple):
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of tokens, ends excluded."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @property
    def area(self) -> int:
        """Tokens in the box."""
        return (self.bottom - self.top) * (self.right - self.left)


def mix_box(grid: tuple[int, int], *, generator: torch.Generator | None = None) -> Box:
    """Draw a box on a grid of h rows and w columns: a uniform share of its area, cut at borders.

    Example:
        >>> mix_box((14, 14), generator=torch.Generator().manual_seed(1)).area <= 196
        True
    """
    share = float(
        torch.rand((), generator=generator, dtype=torch.float64, device=_where(generator))
    )
    ends = []
    for side in grid:
        cut = int(side * math.sqrt(1 - share))
        centre = int(torch.randint(side, (), generator=generator, device=_where(generator)))
        ends.append((max(centre - cut // 2, 0), min(centre + cut // 2, side)))
    (top, bottom), (left, right) = ends
    return Box(top, left, bottom, right)


def check_box(box: tuple[int, int, int, int], grid: tuple[int, int]) -> Box:
    """Return (top, left, bottom, right) as a :class:`Box`.

    Raises:
        ValueError: it does not lie on the grid.
    """
    found = Box(*(int(v) for v in box))
    for name, low, high, side in (
        ("rows", found.top, found.bottom, grid[0]),
        ("columns", found.left, found.right, grid[1]),
    ):
        if not 0 <= low <= high <= side:
            raise ValueError(
                f"box {tuple(found)}: {name} {low} to {high} do not lie among the {side} of the "
                "token grid; the order is (top, left, bottom, right), in tokens of 16 pixels"
            )
    return found


def mix_tokens(x: Tensor, box: Box, *, scale: int = 1) -> Tensor:
    """Return a map (B, H, W, C) whose box comes from the batch in reverse; twice: the map itself.

    Args:
        x: the map.
        box: in tokens.
        scale: places of the map a token has on each side.
    """
    rows = slice(scale * box.top, scale * box.bottom)
    columns = slice(scale * box.left, scale * box.right)
    mixed = x.clone()
    mixed[:, rows, columns] = x.flip(0)[:, rows, columns]
    return mixed


def _where(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device
