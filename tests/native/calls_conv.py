"""Calls of the convolutions' kernels over shapes that are apt to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.layers.conv_op import short_conv

# batch, length, channels, taps
SHAPES = ((1, 1, 1, 1), (2, 33, 300, 4), (3, 2, 17, 4), (1, 70, 256, 7), (2, 5, 513, 2),
          (0, 4, 16, 4), (2, 3, 0, 4))  # fmt: skip


def inputs(shape: tuple[int, ...], *, seed: int = 0, sliced: bool = False) -> list[Tensor]:
    """x, what came before, weight and bias, in float64; ``sliced``: x is part of a wider one."""
    batch, length, channels, taps = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    x = draw(batch, length, channels + 5)[..., 5:] if sliced else draw(batch, length, channels)
    return [x, draw(batch, taps - 1, channels), draw(channels, 1, taps), draw(channels)]


def calls() -> Iterator[None]:
    """Do one call after another."""
    for index, shape in enumerate(SHAPES):
        for sliced in (False, True):
            leaves = [t.float().requires_grad_() for t in inputs(shape, sliced=sliced)]
            bias = leaves[3] if index % 2 else None
            short_conv(leaves[0], leaves[1], leaves[2], bias).sum().backward()
            yield
