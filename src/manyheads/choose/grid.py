"""Token mixers on maps as subjects of the cost stage, with the facts that predictions need.

B batch, C channels, H and W rows and columns, N = H · W places, G heads.

A mixer is measured with its projections, unlike a mechanism on sequences: pooling has none, and
that is part of what it saves. Mechanisms on sequences stand in the same list, on the flattened
map and with projections too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from manyheads.attention.grid import GridShape, Mixer, build_mixer, get_mixer
from manyheads.registry import Shape

__all__ = ["GridSubject", "ladder_of", "map_of"]

_LEAST_SIDE, _MOST_RUNGS = 4, 4


def ladder_of(grid: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Return the maps to measure at, ascending: halves of the sides, down to four places."""
    maps = [grid]
    while len(maps) < _MOST_RUNGS and min(maps[-1]) // 2 >= _LEAST_SIDE:
        maps.append((maps[-1][0] // 2, maps[-1][1] // 2))
    return tuple(reversed(maps))


def map_of(grid: tuple[int, int], places: int) -> tuple[int, int]:
    """Return the rows and columns of so many places: a rung of the ladder, else of one shape."""
    for rows, columns in ladder_of(grid):
        if rows * columns == places:
            return rows, columns
    rows = max(round(math.sqrt(places * grid[0] / grid[1])), 1)
    return rows, max(round(places / rows), 1)


@dataclass(frozen=True)
class GridSubject:
    """A mixer at the maps of one workload; reads as a `Mechanism` that does not decode.

    Attributes:
        name: of the mixer.
        grid: rows and columns of the largest map.
    """

    name: str
    grid: tuple[int, int]

    update = None
    step = None
    constant_state = False

    @property
    def mixer(self) -> Mixer:
        """The record of the mixer."""
        return get_mixer(self.name)

    def sizes(self, shape: Shape) -> GridShape:
        """Return a layer's shapes as those of a map."""
        rows, columns = map_of(self.grid, shape.length)
        return GridShape(
            batch=shape.batch, dim=shape.heads * shape.head_dim, height=rows, width=columns,
            num_heads=shape.heads,
        )  # fmt: skip

    def build(self, shape: Shape, *, training: bool, seed: int = 0) -> nn.Module:
        """Return the module, with weights from a seed, in training or in evaluation.

        Raises:
            ValueError: the mixer cannot have these sizes.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return _build(self.name, self.sizes(shape)).train(training)

    def inputs(self, shape: Shape, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Return a random map (B, C, H, W)."""
        s = self.sizes(shape)
        return {"x": torch.randn(s.batch, s.dim, s.height, s.width, generator=generator)}

    def flops(self, shape: Shape) -> int:
        """Return forward FLOPs in closed form, projections included."""
        return self.mixer.flops(self.sizes(shape))

    def bytes_moved(self, shape: Shape) -> int:
        """Return the least bytes read and written: the map and the weights in, the map out."""
        s = self.sizes(shape)
        return 4 * (2 * s.batch * s.dim * s.tokens + _parameters(self.name, s))

    def state_numbers(self, shape: Shape) -> int:
        """Return 0: nothing is decoded."""
        return 0

    def memory_numbers(self, shape: Shape) -> int:
        """Return the least extra numbers: a map, the weights, and what the mixer says it holds."""
        s = self.sizes(shape)
        return s.batch * s.dim * s.tokens + _parameters(self.name, s) + self.mixer.extra(s)


def _build(name: str, s: GridShape) -> nn.Module:
    return build_mixer(name, s.dim, num_heads=s.num_heads, grid=(s.height, s.width))


@lru_cache(maxsize=1024)
def _parameters(name: str, s: GridShape) -> int:
    with torch.random.fork_rng(), torch.device("meta"):
        try:
            return sum(p.numel() for p in _build(name, s).parameters())
        except RuntimeError:  # a matrix of all places by all places has more numbers than int64
            return s.tokens**2
