"""Orchid's product by its definition. B batch, H heads, N length, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.fourier import Norm
from manyheads.layers.heads import repeat_kv

__all__ = ["circular_conv_reference", "orchid_reference"]


def circular_conv_reference(x: Tensor, kernel: Tensor, *, norm: Norm = "backward") -> Tensor:
    """y_i = c Σ_j kernel_j x_{(i - j) mod N} over axis -2, summed term by term in O(N²).

    c is 1, 1/sqrt(N) or 1/N by ``norm``; arguments as :func:`manyheads.attention.circular_conv`.
    """
    n = x.shape[-2]
    y = torch.zeros_like(x + kernel)
    for j in range(n):
        y = y + kernel[..., j : j + 1, :] * x.roll(j, -2)
    return y * {"backward": 1.0, "ortho": n**-0.5, "forward": 1 / n}[norm]


def orchid_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    norm: Norm = "backward",
    mask: Tensor | None = None,
) -> Tensor:
    """query ⊙ (kernel * (key ⊙ value)), one sequence at a time: the oracle of the tests."""
    heads = query.shape[1]
    key, value, kernel = (repeat_kv(t, heads) for t in (key, value, kernel))
    kernel = kernel.expand_as(key)
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        real = slice(None) if mask is None else mask[b].nonzero().flatten()
        x = key[b, :, real] * value[b, :, real]
        if x.shape[1] == 0:
            continue
        y = circular_conv_reference(x, kernel[b, :, real], norm=norm)
        if skip is not None:
            y = y + skip[:, None] * x
        out[b, :, real] = query[b, :, real] * y
    return out
