"""SimpleRMSNorm over all heads, alone and behind a product, with a closed-form backward.

B batch, H heads, N length, D head dim of queries, V head dim of values.

y = x / (r + eps) with r = ||x|| / sqrt(H V) for each token. With g the gradient of y,
dx = (g - y · (g · y) (r + eps) / (r H V)) / (r + eps), and g / eps where r = 0: the norm's
subgradient there is 0. Only y and r are kept, x is not; spans of tokens are worked through whose
temporaries stay in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fused_norm_over_heads", "normed_product"]

_SPAN_NUMBERS = 1 << 18  # numbers in one (B, H, span, V) temporary: 1 MiB in float32


def fused_norm_over_heads(x: Tensor, *, eps: float) -> Tensor:
    """Return the normalised (B, H, N, V); ``x`` is float32 or float64."""
    return _norm_op(x, eps)[0]


def normed_product(query: Tensor, memory: Tensor, *, eps: float) -> Tensor:
    """Return the normalised ``query`` (B, H, N, D) @ ``memory`` (B, H, D, V): (B, H, N, V)."""
    return _product_op(query, memory, eps)[0]


@torch.library.custom_op("manyheads::norm_over_heads", mutates_args=())
def _norm_op(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rms = _empty_out(x, x.shape[3])
    for span in _spans(y):
        _normalise(x[:, :, span], y[:, :, span], rms[:, :, span], eps)
    return y, rms


@_norm_op.register_fake
def _(x, eps):  # type: ignore[no-untyped-def]
    return _empty_out(x, x.shape[3])


@torch.library.custom_op("manyheads::norm_over_heads_backward", mutates_args=())
def _norm_backward_op(grad: Tensor, y: Tensor, rms: Tensor, eps: float) -> Tensor:
    dx = torch.empty_like(y)
    for span in _spans(y):
        dx[:, :, span] = _slope(grad[:, :, span], y[:, :, span], rms[:, :, span], eps)
    return dx


@_norm_backward_op.register_fake
def _(grad, y, rms, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(y)


def _norm_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.eps = inputs
    y, rms = output
    ctx.mark_non_differentiable(rms)
    ctx.save_for_backward(y, rms)


def _norm_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    y, rms = ctx.saved_tensors
    return _norm_backward_op(grad, y, rms, ctx.eps), None


_norm_op.register_autograd(_norm_backward, setup_context=_norm_context)


@torch.library.custom_op("manyheads::normed_product", mutates_args=())
def _product_op(query: Tensor, memory: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, rms = _empty_out(query, memory.shape[3])
    with torch.autocast(query.device.type, enabled=False):
        for span in _spans(y):
            x = query[:, :, span] @ memory
            _normalise(x, y[:, :, span], rms[:, :, span], eps)
    return y, rms


@_product_op.register_fake
def _(query, memory, eps):  # type: ignore[no-untyped-def]
    return _empty_out(query, memory.shape[3])


@torch.library.custom_op("manyheads::normed_product_backward", mutates_args=())
def _product_backward_op(
    query: Tensor, memory: Tensor, grad: Tensor, y: Tensor, rms: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dquery, dmemory = torch.empty_like(query), torch.zeros_like(memory)
    with torch.autocast(query.device.type, enabled=False):
        for span in _spans(y):
            dx = _slope(grad[:, :, span], y[:, :, span], rms[:, :, span], eps)
            dquery[:, :, span] = dx @ memory.mT
            dmemory += query[:, :, span].mT @ dx
    return dquery, dmemory


@_product_backward_op.register_fake
def _(query, memory, grad, y, rms, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(memory)


def _product_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, memory, ctx.eps = inputs
    y, rms = output
    ctx.mark_non_differentiable(rms)
    ctx.save_for_backward(query, memory, y, rms)


def _product_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, memory, y, rms = ctx.saved_tensors
    return *_product_backward_op(query, memory, grad, y, rms, ctx.eps), None


_product_op.register_autograd(_product_backward, setup_context=_product_context)


def _normalise(x: Tensor, y: Tensor, rms: Tensor, eps: float) -> None:
    """Write the normalised ``x`` to ``y`` and its root mean squares to ``rms``."""
    count = x.shape[1] * x.shape[3]
    size = torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True) * count**-0.5
    rms.copy_(size)
    torch.div(x, size + eps, out=y)


def _slope(grad: Tensor, y: Tensor, rms: Tensor, eps: float) -> Tensor:
    """Return the gradient of x from that of y."""
    count, size = y.shape[1] * y.shape[3], rms + eps
    along = (grad * y).sum((1, 3), keepdim=True) / rms * (size / count)
    along = along.masked_fill(rms == 0, 0)
    return torch.addcmul(grad, y, along, value=-1).div_(size)


def _spans(y: Tensor) -> list[slice]:
    batch, heads, length, dim = y.shape
    size = max(1, _SPAN_NUMBERS // max(1, batch * heads * dim))
    return [slice(a, a + size) for a in range(0, length, size)]


def _empty_out(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return an empty (B, H, N, V) whose heads lie together for each token, and (B, 1, N, 1).

    Merging the heads is then free.
    """
    batch, heads, length, _ = x.shape
    y = x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return y, x.new_empty(batch, 1, length, 1)
