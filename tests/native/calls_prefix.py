"""Calls of the prefix softmax's kernels over shapes that are apt to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.attention.aaren import AarenState, prefix_attention
from manyheads.attention.aaren.definition import prefix_step

# batch, heads, length, values
SHAPES = ((1, 1, 1, 1), (2, 3, 33, 20), (1, 2, 63, 64), (3, 1, 16, 65), (1, 2, 50, 130),
          (1, 4, 7, 16), (0, 2, 5, 16), (1, 2, 5, 0))  # fmt: skip


def inputs(shape: tuple[int, ...], *, seed: int = 0, spread: float = 3) -> list[Tensor]:
    """Scores, values and a state to begin with, in float64."""
    batch, heads, length, dim = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    return [
        draw(batch, heads, length) * spread, draw(batch, heads, length, dim),
        draw(batch, heads), draw(batch, heads).exp(), draw(batch, heads, dim),
    ]  # fmt: skip


def calls() -> Iterator[None]:
    """Do one call after another."""
    for index, shape in enumerate(SHAPES):
        given = [t.float().requires_grad_() for t in inputs(shape)]
        state = AarenState(*given[2:]) if index % 2 else None
        mask = torch.rand(shape[0], shape[2]) > 0.3 if index % 3 else None
        out, after = prefix_attention(
            given[0], given[1], state=state, mask=mask, implementation="native"
        )
        (out.sum() + after.u.sum() + after.w.sum()).backward()
        with torch.no_grad():
            prefix_step(after, given[0][..., 0], given[1][:, :, 0])
        yield
