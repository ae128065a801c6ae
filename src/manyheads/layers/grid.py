"""Learned positions of a grid of patches, for grids of other sizes. C channels."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

__all__ = ["resize_positions"]


def resize_positions(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Return learned positions (1, G · G, C) of a square grid for a grid of ``size`` rows, columns.

    Bicubic interpolation without antialiasing, computed in float32; of the same size: the tensor
    itself.

    Raises:
        ValueError: the number of positions is no square.
    """
    side = math.isqrt(positions.shape[1])
    if side * side != positions.shape[1]:
        raise ValueError(
            f"{positions.shape[1]} positions are no square grid: those of other shapes (a class "
            "token among them) have to be cut apart first"
        )
    if size == (side, side):
        return positions
    grid = positions.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=size, mode="bicubic", align_corners=False)
    return grid.flatten(2).mT.to(positions.dtype)
