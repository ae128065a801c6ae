"""Outlook attention: each place of a coarse grid predicts how its window mixes itself (2106.13112).

B batch, H and W rows and columns, h and w of the anchors (every s-th place), C channels, n heads,
d = C / n, K side of a window, s stride.

An anchor's own features give the K² x K² weights of its window without any query-key product:

A = softmax(scale · Linear(mean of the s x s places)),  y_window = A · v_window,

and the windows, which overlap, are summed (not averaged) back onto the map. Places beyond the
border have values of zero but keep their share of the softmax. Yuan et al., "VOLO: Vision
Outlooker for Visual Recognition". Linear in places: N/s² · (n K⁴ C + K⁴ C) + 2 N C² multiply-adds,
N = H · W. Local: one layer reaches K − 1 places. Exact; nothing of the fast form is approximate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["outlook", "outlook_reference"]


def outlook_reference(
    value: Tensor, weights: Tensor, *, stride: int = 1, padding: int | None = None
) -> Tensor:
    """The definition: loops over anchors and places of windows; arguments as :func:`outlook`.

    Example:
        >>> even = torch.full((1, 2, 2, 3, 9, 9), 1 / 9)
        >>> outlook_reference(torch.ones(1, 4, 4, 6), even, stride=2).shape
        torch.Size([1, 4, 4, 6])
    """
    kernel, pad = _check(value, weights, stride, padding)
    batch, rows, columns, dim = value.shape
    heads = weights.shape[3]
    v = value.unflatten(3, (heads, dim // heads))
    out = torch.zeros_like(v)

    def places(anchor_row: int, anchor_column: int) -> list[tuple[int, int, int]]:
        """Return (place in the window, row, column) of what lies on the map."""
        found = []
        for place in range(kernel * kernel):
            row = anchor_row * stride + place // kernel - pad
            column = anchor_column * stride + place % kernel - pad
            if 0 <= row < rows and 0 <= column < columns:
                found.append((place, row, column))
        return found

    for i in range(weights.shape[1]):
        for j in range(weights.shape[2]):
            window = places(i, j)
            for query, row, column in window:
                for key, key_row, key_column in window:
                    share = weights[:, i, j, :, query, key, None]  # (B, n, 1)
                    out[:, row, column] += share * v[:, key_row, key_column]
    return out.reshape(batch, rows, columns, dim)


def outlook(
    value: Tensor, weights: Tensor, *, stride: int = 1, padding: int | None = None
) -> Tensor:
    """Mix the windows of all anchors and sum them where they overlap.

    Windows are gathered from a channels-last map by strided views, mixed by one batched product,
    and added back by K² strided sums; neither the columns of an unfold nor their transposes are
    made, in either direction.

    Args:
        value: (B, H, W, C).
        weights: (B, h, w, n, K², K²), h = ceil(H / s), w = ceil(W / s): how each place of a window
            (row by row; second last axis) reads the places of that window (last axis). Usually a
            softmax over the last axis.
        stride: s, places between anchors.
        padding: places that the first window reaches beyond the border; None: K // 2.

    Returns:
        (B, H, W, C).

    Raises:
        ValueError: the number of anchors, heads or window places does not fit the map.

    Example:
        >>> value, logits = torch.randn(2, 9, 6, 24), torch.randn(2, 5, 3, 3, 9, 9)
        >>> outlook(value, logits.softmax(-1), stride=2).shape
        torch.Size([2, 9, 6, 24])
    """
    kernel, pad = _check(value, weights, stride, padding)
    _, rows, columns, dim = value.shape
    heads = weights.shape[3]
    grid = (rows, columns, kernel, stride, pad)
    places = kernel * kernel
    windows = _windows(value.unflatten(3, (heads, dim // heads)), *grid)
    mixed = torch.matmul(weights, windows.view(*weights.shape[:4], places, dim // heads))
    return _fold(mixed.unflatten(4, (kernel, kernel)), *grid).flatten(3)


def _check(value: Tensor, weights: Tensor, stride: int, padding: int | None) -> tuple[int, int]:
    """Return K and the padding."""
    places = weights.shape[-1]
    kernel = next(k for k in range(1, places + 2) if k * k >= places)
    pad = kernel // 2 if padding is None else padding
    if torch.compiler.is_compiling():
        return kernel, pad
    if value.ndim != 4:
        raise ValueError(
            f"value has {value.ndim} axes {tuple(value.shape)}, expected (batch, rows, columns, "
            "channels)"
        )
    if weights.ndim != 6 or weights.shape[-2] != places or kernel * kernel != places:
        raise ValueError(
            f"weights {tuple(weights.shape)} must be (batch, anchor rows, anchor columns, heads, "
            "K², K²) with a square number K²"
        )
    if value.shape[0] != weights.shape[0]:
        raise ValueError(
            f"value has a batch of {value.shape[0]}, weights of {weights.shape[0]}: give one "
            "set of weights a map"
        )
    if value.shape[3] % weights.shape[3]:
        raise ValueError(
            f"{value.shape[3]} channels are not a multiple of {weights.shape[3]} heads"
        )
    for name, size, anchors in (
        ("rows", value.shape[1], weights.shape[1]),
        ("columns", value.shape[2], weights.shape[2]),
    ):
        fit = (size + 2 * pad - kernel) // stride + 1
        if anchors != -(-size // stride) or anchors != fit:
            raise ValueError(
                f"{size} {name} have {-(-size // stride)} anchors at stride {stride} and {fit} "
                f"windows of {kernel} at padding {pad}, the weights {anchors}: the three must be "
                "equal; padding (K - 1) / 2 with an odd K is so for any size"
            )
    return kernel, pad


def _spans(
    size: int, anchors: int, kernel: int, stride: int, pad: int
) -> list[tuple[slice, slice]]:
    """Return, for each offset in a window, the anchors whose place is on the map, and places."""
    found = []
    for offset in range(kernel):
        first = max(0, -(-(pad - offset) // stride))
        last = min(anchors - 1, (size - 1 + pad - offset) // stride)
        count = max(0, last - first + 1)
        start = first * stride + offset - pad if count else 0
        stop = start + (count - 1) * stride + 1 if count else 0
        found.append((slice(first, first + count), slice(start, stop, stride)))
    return found


def _gather(v: Tensor, rows: int, columns: int, kernel: int, stride: int, pad: int) -> Tensor:
    """Return windows (B, h, w, n, K, K, d) of a map (B, H, W, n, d), zero beyond the border."""
    high, wide = -(-rows // stride), -(-columns // stride)
    padded = F.pad(v, (0, 0, 0, 0, pad, pad, pad, pad)) if pad else v
    views = padded.unfold(1, kernel, stride).unfold(2, kernel, stride)  # (B, h, w, n, d, K, K)
    return views[:, :high, :wide].permute(0, 1, 2, 3, 5, 6, 4).contiguous()


def _scatter(y: Tensor, rows: int, columns: int, kernel: int, stride: int, pad: int) -> Tensor:
    """Return the sum (B, H, W, n, d) of windows (B, h, w, n, K, K, d)."""
    batch, high, wide, heads, _, _, dim = y.shape
    out = y.new_zeros(batch, rows, columns, heads, dim)
    across = _spans(columns, wide, kernel, stride, pad)
    for i, (anchor_rows, places) in enumerate(_spans(rows, high, kernel, stride, pad)):
        for j, (anchor_columns, beside) in enumerate(across):
            out[:, places, beside] += y[:, anchor_rows, anchor_columns, :, i, j]
    return out


# Gathering and scattering are each other's transposes; autograd through the views and the sums
# in place would copy the whole gradient for every place of a window.
class _Windows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, *grid: int) -> Tensor:
        ctx.grid = grid
        return _gather(v, *grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _fold(grads[0], *ctx.grid), None, None, None, None, None


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *grid: int) -> Tensor:
        ctx.grid = grid
        return _scatter(y, *grid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _windows(grads[0], *ctx.grid), None, None, None, None, None


def _windows(v: Tensor, *grid: int) -> Tensor:
    return _Windows.apply(v, *grid)


def _fold(y: Tensor, *grid: int) -> Tensor:
    return _Fold.apply(y, *grid)
