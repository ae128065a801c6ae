"""Products, sums and tiles that the fast forms of flow attention are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.linear import cut_chunks

__all__ = [
    "Tile",
    "bounded",
    "cut_numbers",
    "cut_tile",
    "dot",
    "empty_outputs",
    "product",
    "weighted_sum",
]


def empty_outputs(query: Tensor, value: Tensor) -> Tensor:
    """Return empty outputs (B, H, N, V) whose heads can be merged without a copy."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """(..., N, D) times (..., D): (..., N)."""
    return (x * y[..., None, :]).sum(-1)


def product(x: Tensor, flow: Tensor, eps: float, outer_eps: float) -> Tensor:
    """Return (x + eps)·(flow + eps) + outer_eps, as a new tensor."""
    flow = flow + eps
    return dot(x, flow).add_(eps * flow.sum(-1, keepdim=True) + outer_eps)


def weighted_sum(weight: Tensor, x: Tensor, eps: float = 0.0) -> Tensor:
    """(..., N) times (..., N, D): Σ w (x + eps), (..., D)."""
    total = (weight[..., None, :] @ x).squeeze(-2)
    return total + eps * weight.sum(-1, keepdim=True) if eps else total


def bounded(conserved: Tensor, clamp: float | None, real: Tensor | None) -> Tensor:
    """Return what a source competes with: clamped, the least number at padding."""
    force = conserved if clamp is None else conserved.clamp(-clamp, clamp)
    return force if real is None else force.masked_fill(~real, torch.finfo(force.dtype).min)


class Tile(NamedTuple):
    """Some chunks of some rows: (B, H, n, C, ·), and (B, 1, n, C) for ``number`` and ``real``.

    ``q``, ``k`` are mapped, and 0 where ``real`` is False (None: all are real). ``number``
    counts the real tokens up to each. ``others``: whatever else was cut.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    number: Tensor
    real: Tensor | None
    others: tuple[Tensor, ...]


def cut_tile(
    tensors: tuple[Tensor, ...],
    number: Tensor,
    mask: Tensor | None,
    rows: slice,
    span: tuple[int, int],
    *,
    chunk_size: int,
    squash: bool,
) -> Tile:
    """Cut queries, keys, values and what follows them to a tile; the last chunk is padded."""
    start, stop = span
    query, key, value, *others = cut_chunks(tensors, rows, start, stop, chunk_size)
    missing = -(stop - start) % chunk_size
    n = F.pad(number[rows, None, start:stop], (0, missing), value=1.0)
    n = n.unflatten(-1, (-1, chunk_size))
    if squash:
        query, key = query.sigmoid(), key.sigmoid()
    if mask is None and not missing:
        return Tile(query, key, value, n, None, tuple(others))
    if mask is None:
        real = n.new_ones(n.shape[0], 1, stop - start, dtype=torch.bool)
    else:
        real = mask[rows, None, start:stop]
    real = F.pad(real, (0, missing)).view_as(n)
    query, key = query * real[..., None], key * real[..., None]
    return Tile(query, key, value, n, real, tuple(others))


def cut_numbers(
    numbers: Tensor, rows: slice, span: tuple[int, int], *, chunk_size: int
) -> tuple[Tensor, ...]:
    """Cut numbers a token (·, B, H, N) to (B, H, n, C) each; ones fill the last chunk."""
    missing = -(span[1] - span[0]) % chunk_size
    part = F.pad(numbers[:, rows, :, span[0] : span[1]], (0, missing), value=1.0)
    return part.unflatten(-1, (-1, chunk_size)).unbind(0)
