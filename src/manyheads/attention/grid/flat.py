"""Bidirectional mechanisms on sequences as mixers of flattened maps."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from manyheads.attention.grid.registry import GridShape, Mixer
from manyheads.layers.grid import sinusoidal_map
from manyheads.registry import Shape, get_mechanism

__all__ = ["FlatMixer", "mixer_of"]


class FlatMixer(nn.Module):
    """A bidirectional sequence mechanism on the places of a map, row by row.

    Positions on the map are added where the mechanism knows none: without them it could not tell
    neighbours from far places.

    Args:
        name: of the mechanism.
        dim: C.
        num_heads: H.
        options: of the mechanism's config.
    """

    def __init__(self, name: str, dim: int, *, num_heads: int, **options: Any) -> None:
        super().__init__()
        mechanism = get_mechanism(name)
        values: dict[str, Any] = {
            "embed_dim": dim, "num_heads": num_heads, "is_causal": False
        }  # fmt: skip
        self.mixer = mechanism.module(mechanism.config.from_dict(values | options))
        self.has_positions = not mechanism.positional

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        if self.has_positions:
            x = x + sinusoidal_map(*x.shape[1:], device=x.device).to(x)
        out = self.mixer(x.flatten(2).mT)
        return out.mT.reshape(x.shape)


def mixer_of(name: str) -> Mixer:
    """Return the record of a bidirectional mechanism as a mixer."""
    mechanism = get_mechanism(name)
    has_length = "max_length" in {f.name for f in fields(mechanism.config)}

    def build(
        dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
    ) -> nn.Module:
        if has_length and grid is not None:
            options = {"max_length": grid[0] * grid[1]} | options
        return FlatMixer(name, dim, num_heads=num_heads, **options)

    def flops(s: GridShape) -> int:
        own = Shape(
            batch=s.batch, heads=s.num_heads, length=s.tokens, head_dim=s.dim // s.num_heads,
            is_causal=False,
        )  # fmt: skip
        return mechanism.flops(own) + 8 * s.batch * s.tokens * s.dim**2

    return Mixer(
        name=name,
        summary=mechanism.summary,
        paper=mechanism.paper,
        build=build,
        any_size=not has_length,
        cost=mechanism.cost,
        flops=flops,
        notes=mechanism.notes,
    )
