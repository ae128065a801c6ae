"""Learned positions of a grid of patches, for grids of other sizes. C channels."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["resize_map", "resize_positions", "sinusoidal_map"]


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


def resize_map(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Return learned positions (1, C, G, F) of a map of any shape for ``size`` rows, columns.

    Bicubic, without antialiasing, in float32; of the same size: the tensor itself.
    """
    if size == tuple(positions.shape[2:]):
        return positions
    resized = F.interpolate(positions.float(), size=size, mode="bicubic", align_corners=False)
    return resized.to(positions.dtype)


def sinusoidal_map(
    dim: int, height: int, width: int, *, device: torch.device | None = None
) -> Tensor:
    """Return sines of rows and columns (C, H, W): half of the channels each; C may be any number.

    Wavelengths grow geometrically from 2π to 20,000π places, as in one dimension.
    """
    half = (dim + 1) // 2
    parts = []
    for count, channels in ((height, half), (width, dim - half)):
        places = torch.arange(count, device=device, dtype=torch.float32)
        rates = torch.arange((channels + 1) // 2, device=device, dtype=torch.float32)
        angles = places[:, None] * 10000.0 ** (-2 * rates / max(channels, 1))
        parts.append(torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :channels].mT)
    rows = parts[0][:, :, None].expand(-1, -1, width)
    columns = parts[1][:, None].expand(-1, height, -1)
    return torch.cat((rows, columns))
