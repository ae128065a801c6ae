"""What a map's size alone decides: which neighbours exist, and how far pooled keys are.

H and W rows and columns, N = H · W places row by row, w window, P pooled places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["axis_table", "log_coordinates", "neighbours", "pooled_place"]

T = TypeVar("T", bound=tuple[Tensor, ...])
_KEPT: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
_MOST = 256


def _kept(make: Callable[..., T]) -> Callable[..., T]:
    """Keep what was made for these sizes on this device; every block of a stage asks the same."""

    def get(*sizes: int, device: torch.device | None = None) -> T:
        if torch.compiler.is_compiling():
            return make(*sizes, device=device)
        key = (make, sizes, device)
        if key not in _KEPT:
            # Tensors of inference mode could not be saved for a backward pass later on.
            with torch.inference_mode(False):
                made = make(*sizes, device=device)
            if any(type(t) is not Tensor for t in made):
                return made  # fake tensors of a tracer die with it
            if len(_KEPT) >= _MOST:
                _KEPT.clear()
            _KEPT[key] = made
        return _KEPT[key]  # type: ignore[return-value]

    return get


@_kept
def neighbours(
    height: int, width: int, window: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return how many cells of each place's window lie in the map, and which do not.

    Args:
        height, width: H and W.
        window: w, odd.
        device: of the results.

    Returns:
        Counts (N,), float32, and a mask (w², N), True outside.
    """
    reach = torch.arange(window, device=device) - window // 2
    rows = torch.arange(height, device=device) + reach[:, None]  # (w, H)
    columns = torch.arange(width, device=device) + reach[:, None]
    no_row = (rows < 0) | (rows >= height)
    no_column = (columns < 0) | (columns >= width)
    outside = no_row[:, None, :, None] | no_column[None, :, None, :]  # (w, w, H, W)
    outside = outside.reshape(window * window, height * width)
    return (~outside).sum(0).float(), outside


def pooled_place(index: int, size: int, pooled: int) -> int:
    """Return twice the mean place of a bin of an adaptive average pool, a whole number.

    Bins run from floor(i · size / pooled) to ceil((i + 1) · size / pooled) and may overlap.
    """
    return index * size // pooled - (-(index + 1) * size // pooled) - 1


@_kept
def axis_table(
    size: int, pooled: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Return the distances from queries to pooled keys along one axis, and which pair has which.

    Args:
        size: queries on the axis.
        pooled: keys on the axis.
        device: of the results.

    Returns:
        Distances (U,) in places, ascending, float32 (where bins overlap, a few that no pair has
        may be among them); and the index (pooled · size,) of the distance of every pair, keys
        outside, queries inside.
    """
    bins = torch.arange(pooled, device=device)
    keys = bins * size // pooled + ((bins + 1) * size + pooled - 1) // pooled - 1
    least = -pooled_place(pooled - 1, size, pooled)
    most = 2 * (size - 1) - pooled_place(0, size, pooled)
    # Twice the places of keys are all even or all odd where all bins have the same width.
    step = 2 if len({pooled_place(i, size, pooled) % 2 for i in range(pooled)}) == 1 else 1
    distances = torch.arange(least, most + 1, step, dtype=torch.float32, device=device) / 2
    pairs = 2 * torch.arange(size, device=device) - keys[:, None] - least
    return distances, (pairs // step).flatten()


def log_coordinates(distances: Tensor, pretrain: int) -> Tensor:
    """Return sign(δ) · log2(|δ| + 1) / 3 of δ = 8 · distance / (pretrain − 1).

    Args:
        distances: in places, of any shape.
        pretrain: places on the axis of the map that training started with.
    """
    delta = distances / max(pretrain - 1, 1) * 8
    return delta.sign() * (delta.abs() + 1).log2() / math.log2(8)
