"""Small parts of a memory's retrieval: positions, scores by group, the best with ties settled.

B batch, H query heads, H_kv key heads, T tokens, S blocks, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.rotary import apply_rotary, rotary_angles

__all__ = ["best_blocks", "grouped_scores", "turn"]


def turn(x: Tensor, places: Tensor | int, *, theta: float | None, interleaved: bool) -> Tensor:
    """Rotate ``x`` (..., D), at least 4 axes, by places that broadcast to its other axes."""
    if theta is None:
        return x
    if isinstance(places, int):
        places = torch.full((1,) * (x.ndim - 1), places, device=x.device)
    while places.ndim < x.ndim - 1:
        places = places[None]
    cos, sin = rotary_angles(places, x.shape[-1], theta=theta)
    return apply_rotary(x, cos, sin, interleaved=interleaved)


def grouped_scores(query: Tensor, gates: Tensor) -> Tensor:
    """(B, H, T, D) with (B, H_kv, D, S) to (B, H, T, S)."""
    batch, heads, length, _ = query.shape
    q = query.reshape(batch, gates.shape[1], -1, query.shape[3])
    return (q @ gates).view(batch, heads, length, -1)


def best_blocks(scores: Tensor, count: int, slack: Tensor) -> Tensor:
    """Return the columns of the ``count`` largest scores; the last ones where scores are equal.

    The scores of equal landmarks differ by rounding, so that ``slack`` counts as equal.
    """
    columns = scores.shape[-1]
    least = scores.topk(count).values[..., -1:]
    order = torch.arange(columns, device=scores.device).expand_as(scores)
    above = scores > least + slack
    equal = (scores >= least - slack) & ~above
    # All above come before all equal ones, and the later of these before the earlier.
    return (order + 2 * columns * above + columns * equal).topk(count).indices
