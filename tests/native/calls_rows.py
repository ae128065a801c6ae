"""Calls of linear layers on few rows, over shapes that are apt to go wrong; for sanitizers too."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from manyheads.native import library

# rows, inputs, outputs
SHAPES = ((1, 1, 1), (2, 15, 3), (3, 16, 9), (4, 17, 8), (5, 64, 33), (6, 47, 7), (7, 100, 40),
          (8, 768, 65), (9, 31, 12), (19, 18, 5), (1, 1000, 2), (0, 8, 8), (2, 0, 5),
          (3, 5, 0))  # fmt: skip


def inputs(shape: tuple[int, int, int], *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    rows, width, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, width), (outputs, width), (outputs,))
    x, weight, bias = (torch.randn(s, generator=generator) for s in sizes)
    return x, weight, bias


def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Call the kernel itself, with as many threads as torch has."""
    lib = library("rows")
    assert lib is not None, "the kernels could not be compiled"
    out = torch.full((len(x), len(weight)), float("nan"))
    lib("rows_linear", x, weight, bias, out, *x.shape, len(weight), torch.get_num_threads())
    return out


def calls() -> Iterator[None]:
    """Do one call after another."""
    for shape in SHAPES:
        x, weight, bias = inputs(shape)
        run(x, weight, bias)
        run(x, weight, None)
        yield
