"""Calls of the pooling kernel over shapes that are apt to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.layers.pool_norm import pool_norm

# images, channels, rows, columns, window
SHAPES = ((1, 1, 1, 2, 3), (2, 17, 5, 9, 3), (3, 33, 1, 7, 5), (1, 64, 20, 23, 3), (5, 20, 7, 3, 7),
          (1, 16, 2, 40, 1), (0, 8, 4, 4, 3))  # fmt: skip


def inputs(shape: tuple[int, ...], *, seed: int = 0, mean: float = 1.0) -> list[Tensor]:
    """Maps, gain, weight and bias, in float64."""
    batch, channels, height, width, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x = draw(batch, channels, height, width) + mean
    return [x, draw(channels), draw(channels), draw(channels)]


@torch.no_grad()
def calls() -> Iterator[None]:
    """Do one call after another."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for shape in SHAPES:
                leaves = [t.float() for t in inputs(shape)]
                pool_norm(*leaves, window=shape[4], eps=1e-5, eps_after=1e-6)
                yield
    finally:
        torch.set_num_threads(before)
