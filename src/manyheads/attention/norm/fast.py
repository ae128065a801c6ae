"""SimpleRMSNorm over all heads with a closed-form backward. B batch, H heads, N length, V dim.

y = x / (r + eps) with r = ||x|| / sqrt(H V) for each token. With g the gradient of y,
dx = (g - y · (g · y) (r + eps) / (r H V)) / (r + eps), and g / eps where r = 0: the norm's
subgradient there is 0. Only y and r are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fused_norm_over_heads"]


def fused_norm_over_heads(x: Tensor, *, eps: float) -> Tensor:
    """Return the normalised (B, H, N, V); ``x`` is float32 or float64."""
    return _forward_op(x, eps)[0]


@torch.library.custom_op("manyheads::norm_over_heads", mutates_args=())
def _forward_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    count = x.shape[1] * x.shape[3]
    rms = torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True) * count**-0.5
    y = _empty(x)
    torch.div(x, rms + eps, out=y)
    return y, rms


@_forward_op.register_fake
def _(x, eps):  # type: ignore[no-untyped-def]
    return _empty(x), x.new_empty(x.shape[0], 1, x.shape[2], 1)


@torch.library.custom_op("manyheads::norm_over_heads_backward", mutates_args=())
def _backward_op(grad: Tensor, y: Tensor, rms: Tensor, eps: float) -> Tensor:
    count, size = y.shape[1] * y.shape[3], rms + eps
    along = (grad * y).sum((1, 3), keepdim=True) * (size / (rms * count))
    along = along.masked_fill(rms == 0, 0)
    dx = _empty(y)
    torch.addcmul(grad, y, along, value=-1, out=dx)
    return dx.div_(size)


@_backward_op.register_fake
def _(grad, y, rms, eps):  # type: ignore[no-untyped-def]
    return _empty(y)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.eps = inputs
    y, rms = output
    ctx.mark_non_differentiable(rms)
    ctx.save_for_backward(y, rms)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    y, rms = ctx.saved_tensors
    return _backward_op(grad, y, rms, ctx.eps), None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _empty(x: Tensor) -> Tensor:
    """Return an empty (B, H, N, V) whose heads lie together for each token: merging is free."""
    batch, heads, length, dim = x.shape
    return x.new_empty(batch, length, heads, dim).transpose(1, 2)
