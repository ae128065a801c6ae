"""Both attentions as token mixers by name: "aggregated" and "length_scaled"."""

from __future__ import annotations

from typing import Any

from torch import nn

from manyheads.attention.aggregated.module import AggregatedAttention, LengthScaledAttention
from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer

__all__ = ["default_sr_ratio"]

_POOLED = 7
_COMMON = ("pretrain_grid", "positions", "qkv_bias", "dropout", "proj_dropout", "implementation")


def default_sr_ratio(grid: tuple[int, int] | None) -> int:
    """Return the pooling that leaves about 7 x 7 keys of a map, as the published models do."""
    return 2 if grid is None else max(min(grid) // _POOLED, 1)


def _aggregated(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    own = ("window_size", "sr_ratio", "fixed_pool_size", "pixel_focused")
    check_options("aggregated", options, *own, *_COMMON)
    values = {"sr_ratio": default_sr_ratio(grid), "pretrain_grid": _start(grid), "grid": grid}
    return AggregatedAttention(dim, num_heads=num_heads, **(values | options))


def _length_scaled(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    check_options("length_scaled", options, *_COMMON)
    values = {"pretrain_grid": _start(grid), "grid": grid}
    return LengthScaledAttention(dim, num_heads=num_heads, **(values | options))


def _start(grid: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if grid is None or min(grid) < 2 else grid


def _aggregated_flops(s: GridShape) -> int:
    ratio = default_sr_ratio((s.height, s.width))
    pooled = max(s.height // ratio, 1) * max(s.width // ratio, 1)
    projections = 10 * s.tokens * s.dim**2 + 4 * pooled * s.dim**2
    return s.batch * (projections + (4 * pooled + 6 * 9) * s.tokens * s.dim)


def _length_scaled_flops(s: GridShape) -> int:
    return s.batch * (8 * s.tokens * s.dim**2 + 4 * s.tokens**2 * s.dim)


_POSITIONS = "the MLP that makes position biases is not in the FLOPs: it runs once a size"

register_mixer(
    Mixer(
        name="aggregated",
        summary="a 3 x 3 window and a pooled view of the map under one softmax; far places blur",
        paper="transnext",
        build=_aggregated,
        any_size=True,
        cost="O(N (w² + P) C), P pooled places",
        flops=_aggregated_flops,
        notes=(_POSITIONS,),
    )
)
register_mixer(
    Mixer(
        name="length_scaled",
        summary="cosine attention scaled by the log of the number of places, for other resolutions",
        paper="transnext",
        build=_length_scaled,
        any_size=True,
        cost="O(N² C)",
        flops=_length_scaled_flops,
        notes=(_POSITIONS,),
    )
)
