"""Depthwise convolution with a few taps, as sums of shifted copies. B batch, N length, D channels.

For a few taps this is several times faster on a CPU than a grouped conv1d. Spans of tokens are
worked through whose temporaries stay in the processor's cache; backward is in closed form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast

__all__ = ["shifted_sum"]

_SPAN_NUMBERS = 1 << 16


def shifted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """y_l = Σ_j w_j x_{l + j} for each channel, without padding.

    Args:
        x: (B, N + K - 1, D).
        weight: (D, K), of the same dtype.

    Returns:
        (B, N, D).
    """
    return _forward_op(x, weight)


@torch.library.custom_op("manyheads::shifted_sum", mutates_args=())
@without_autocast
def _forward_op(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    y = x.new_empty(x.shape[0], x.shape[1] - taps + 1, x.shape[2])
    for row, first, last in _spans(y):
        part = y[row, first:last]
        torch.mul(x[row, first:last], weight[:, 0], out=part)
        for j in range(1, taps):
            part.addcmul_(x[row, first + j : last + j], weight[:, j])
    return y


@_forward_op.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[1] + 1, x.shape[2])


@torch.library.custom_op("manyheads::shifted_sum_backward", mutates_args=())
@without_autocast
def _backward_op(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    taps = weight.shape[1]
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    for row, first, last in _spans(grad):
        g = grad[row, first:last]
        for j in range(taps):
            place = slice(first + j, last + j)
            dx[row, place].addcmul_(g, weight[:, j])
            dweight[:, j] += (g * x[row, place]).sum(0)
    return dx, dweight


@_backward_op.register_fake
def _(grad, x, weight):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(weight)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return _backward_op(grad, *ctx.saved_tensors)


_forward_op.register_autograd(_backward, setup_context=_context)


def _spans(y: Tensor) -> list[tuple[int, int, int]]:
    batch, length, dim = y.shape
    size = max(1, _SPAN_NUMBERS // max(1, dim))
    return [(row, a, min(a + size, length)) for row in range(batch) for a in range(0, length, size)]
