"""Continuous position bias on logarithmic coordinates: an MLP of distances, each asked once.

n heads, N queries of a map of H x W, P keys of its pooled map, U distances on an axis, K hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.aggregated.places import axis_table, log_coordinates

__all__ = ["position_bias", "position_bias_reference", "resized_bias"]

# Numbers of the hidden layer that are held at once: a megabyte.
_PIECE = 1 << 18


def position_bias(
    first: nn.Linear,
    second: nn.Linear,
    size: tuple[int, int],
    pooled: tuple[int, int],
    pretrain: tuple[int, int] | None = None,
) -> Tensor:
    """Return the bias second(relu(first(coordinates))) of every query and pooled key, (n, P, N).

    Two axes' distances are all that the MLP reads: it is asked U · U times instead of N · P, and
    its hidden layer, (U, U, K), is never whole in memory, forward or backward.

    Args:
        first: Linear(2, K) of (row, column) coordinates.
        second: Linear(K, n).
        size, pooled: rows and columns of queries and of keys.
        pretrain: rows and columns of the map that training started with; None: ``size``.
    """
    device = first.weight.device
    lines, indices = [], []
    for axis in (0, 1):
        distances, index = axis_table(size[axis], pooled[axis], device=device)
        near = log_coordinates(distances, (pretrain or size)[axis]).to(first.weight.dtype)
        lines.append(near[:, None] * first.weight[:, axis])  # (U, K)
        indices.append(index)
    rows, columns = lines[0] + first.bias, lines[1]
    if torch.compiler.is_compiling():
        table = F.relu(rows[:, None] + columns) @ second.weight.mT
    else:
        table = cast(Tensor, _Hidden.apply(rows, columns, second.weight))
    table = (table + second.bias).permute(2, 0, 1)  # (n, U, U)
    pairs = table.index_select(1, indices[0]).index_select(2, indices[1])
    pairs = pairs.view(-1, pooled[0], size[0], pooled[1], size[1])
    return pairs.transpose(2, 3).reshape(-1, pooled[0] * pooled[1], size[0] * size[1])


def position_bias_reference(
    first: nn.Linear,
    second: nn.Linear,
    size: tuple[int, int],
    pooled: tuple[int, int],
    pretrain: tuple[int, int] | None = None,
) -> Tensor:
    """Return :func:`position_bias` as it is defined: one table of coordinates, one pass, one index.

    Arguments as there. The hidden layer is held whole, (U · U, K).
    """
    lines, indices = [], []
    for axis in (0, 1):
        distances, index = axis_table(size[axis], pooled[axis], device=first.weight.device)
        lines.append(log_coordinates(distances, (pretrain or size)[axis]).to(first.weight.dtype))
        indices.append(index.view(pooled[axis], size[axis]))
    table = second(F.relu(first(torch.cartesian_prod(*lines))))  # (U · U, n)
    pairs = indices[0][:, None, :, None] * len(lines[1]) + indices[1][:, None]
    return table[pairs.reshape(pooled[0] * pooled[1], -1)].permute(2, 0, 1)


class _Hidden(torch.autograd.Function):
    """relu(rows_i + columns_j) · weightᵀ for all i, j, a few rows at a time both ways."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows, columns, weight)
        pieces = [F.relu(r[:, None] + columns) @ weight.mT for r in _pieces(rows, columns)]
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        rows, columns, weight = ctx.saved_tensors
        d_columns, d_weight, d_rows, start = (
            torch.zeros_like(columns), torch.zeros_like(weight), [], 0
        )  # fmt: skip
        for r in _pieces(rows, columns):
            grad = grads[0][start : start + len(r)]
            hidden = F.relu(r[:, None] + columns)
            d_weight += grad.flatten(0, 1).mT @ hidden.flatten(0, 1)
            d_hidden = (grad @ weight).mul_(hidden > 0)
            d_columns += d_hidden.sum(0)
            d_rows.append(d_hidden.sum(1))
            start += len(r)
        return torch.cat(d_rows), d_columns, d_weight


def _pieces(rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(_PIECE // columns.numel(), 1))


def resized_bias(
    bias: Tensor,
    size: tuple[int, int],
    pooled: tuple[int, int],
    new_size: tuple[int, int],
    new_pooled: tuple[int, int],
) -> Tensor:
    """Return a bias (n, P, N) for maps of another size, resized bilinearly: keys, then queries.

    Args:
        bias: of queries on a map of ``size`` and keys on one of ``pooled``.
        size, pooled, new_size, new_pooled: rows and columns.
    """
    if new_pooled != pooled:
        keys = bias.mT.unflatten(2, pooled)  # (n, N, rows, columns)
        bias = F.interpolate(keys, new_pooled, mode="bilinear", align_corners=False).flatten(2).mT
    if new_size != size:
        queries = bias.unflatten(2, size)  # (n, P, H, W)
        bias = F.interpolate(queries, new_size, mode="bilinear", align_corners=False).flatten(2)
    return bias
