"""URPE attention by its definition. B batch, H heads, N queries, M keys, D head dim.

A relative factor is a table (H or 1, 2R − 1), the value at column R − 1 + j − i for query i and
key j, or a matrix (H or 1, N, M), or one for each example (B or 1, H or 1, N, M).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import positions

__all__ = ["check_factor", "check_factors", "expand_factor", "urpe_reference", "urpe_weights"]


def urpe_weights(
    query: Tensor,
    key: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    count_padding: bool = False,
) -> Tensor:
    """Return the attention matrix C ∘ softmax(scale · Q Kᵀ + B): (B, H, N, M), O(N M) in memory.

    Arguments as :func:`~manyheads.attention.urpe`. Rows do not sum to 1 and entries may be
    negative; without ``multiplier`` it is the softmax alone.
    """
    _, heads, length, dim = query.shape
    scores = query @ repeat_kv(key, heads).mT * (dim**-0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None]
        if not count_padding:
            allowed = allowed & mask[:, None, :, None]
    places = None if count_padding else mask
    if bias is not None:
        scores = scores + expand_factor(bias, length, key.shape[2], mask=places)
    allowed = allowed & ~torch.isneginf(scores)
    empty = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)  # any finite row: its weights are cleared below
    weights = scores.masked_fill(~(allowed | empty), -torch.inf).softmax(-1)
    weights = weights.masked_fill(~allowed, 0)
    if multiplier is not None:
        weights = weights * expand_factor(multiplier, length, key.shape[2], mask=places)
    return weights


def urpe_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    count_padding: bool = False,
) -> Tensor:
    """(C ∘ softmax(scale · Q Kᵀ + B)) V through the N x M matrix: the oracle of the tests."""
    check_qkv(query, key, value, same_length=is_causal)
    check_factors(query, key, bias, multiplier)
    weights = urpe_weights(
        query,
        key,
        bias=bias,
        multiplier=multiplier,
        is_causal=is_causal,
        scale=scale,
        mask=mask,
        count_padding=count_padding,
    )
    return weights @ repeat_kv(value, query.shape[1])


def expand_factor(
    factor: Tensor, length: int, keys: int, *, offset: int = 0, mask: Tensor | None = None
) -> Tensor:
    """Return a table as the matrix it stands for, (H or 1, N, M); a matrix as it is.

    Args:
        factor: a table or a matrix.
        length, keys: N and M.
        offset: place of the first query among the keys.
        mask: (B, N) with N = M: distances are counted among its True places, and the result is
            (B, H or 1, N, M).
    """
    if factor.ndim != 2:
        return factor
    zero = factor.shape[1] // 2
    if mask is None:
        k = torch.arange(keys, device=factor.device)
        q = torch.arange(offset, offset + length, device=factor.device)
        return factor[:, k - q[:, None] + zero]
    places = positions(mask, keys, device=factor.device)
    return factor[:, places[:, None] - places[:, :, None] + zero].transpose(0, 1)


def check_factors(
    query: Tensor, key: Tensor, bias: Tensor | None, multiplier: Tensor | None
) -> None:
    """Check both relative factors against queries and keys; see :func:`check_factor`."""
    for name, factor in (("bias", bias), ("multiplier", multiplier)):
        if factor is not None:
            check_factor(name, factor, query, key.shape[2])


def check_factor(name: str, factor: Tensor, query: Tensor, keys: int) -> None:
    """Check a table or matrix.

    Raises:
        ValueError: names the axis, what was given and what is needed.
    """
    batch, heads, length, _ = query.shape
    if factor.ndim == 2:
        width, need = factor.shape[1], max(length, keys)
        if width % 2 == 0:
            raise ValueError(
                f"{name} is a table of {width} columns, expected an odd number 2R - 1 with "
                "distance 0 in the middle (give a matrix as (1, N, M))"
            )
        if (width + 1) // 2 < need:
            raise ValueError(
                f"{name} is a table for {(width + 1) // 2} places, the sequence has {need}: make "
                "it longer, or clamp distances with RelativeTable(..., beyond='clamp')"
            )
        sizes = {"heads": (factor.shape[0], heads)}
    elif factor.ndim in (3, 4):
        sizes = {"heads": (factor.shape[-3], heads)}
        if factor.ndim == 4:
            sizes["batch"] = (factor.shape[0], batch)
        if factor.shape[-2:] != (length, keys):
            raise ValueError(
                f"{name} is a matrix of {tuple(factor.shape[-2:])}, expected (queries, keys) = "
                f"({length}, {keys})"
            )
    else:
        raise ValueError(
            f"{name} has {factor.ndim} axes: give a table (H, 2R - 1) by distance or a matrix "
            "(H, N, M)"
        )
    for axis, (have, want) in sizes.items():
        if have not in (1, want):
            raise ValueError(f"{axis} of {name} is {have}, expected {want} or 1")
