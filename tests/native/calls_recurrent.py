"""Calls of the recurrent kernels over shapes that are apt to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.attention.gla import GLAState, gla_step
from manyheads.layers.recurrent import short_scan

# batch, heads, key heads, keys, values
SHAPES = ((1, 1, 1, 1, 1), (2, 3, 3, 20, 33), (1, 4, 2, 64, 64), (3, 2, 1, 17, 130),
          (0, 2, 2, 8, 16), (1, 2, 2, 16, 0), (1, 12, 12, 64, 128))  # fmt: skip


def inputs(shape: tuple[int, ...], *, seed: int = 0) -> list[Tensor]:
    """Query, key, value, log decay and a memory, in float64."""
    batch, heads, kv, dim, values = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return [
        draw(batch, heads, dim), draw(batch, kv, dim), draw(batch, kv, values),
        -draw(batch, kv, dim).exp(), draw(batch, heads, dim, values),
    ]  # fmt: skip


def calls() -> Iterator[None]:
    """Do one call after another."""
    for shape in SHAPES:
        *token, memory = (t.float() for t in inputs(shape))
        with torch.no_grad():
            gla_step(GLAState(memory), *token)
        yield
        for length in (0, 1, 7):
            batch, heads, _, dim, values = shape
            sizes = ((length, dim), (length, dim), (length, values), (length, dim), (dim, values))
            q, k, v, g, s = (torch.randn(batch, heads, *size) for size in sizes)
            short_scan(q, k, v, -g.exp(), s)
            short_scan(q, k, v, None, s)
        yield
