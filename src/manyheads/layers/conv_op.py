"""The short convolution as one operator: a kernel where it can be had, PyTorch elsewhere.

B batch, N length, C channels, W kernel size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.precision import without_autocast
from manyheads.native import library, strided

__all__ = ["short_conv"]

_SEGMENT = 256


def short_conv(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(bias + Σ_j w_j x_{t-W+1+j}), (B, N, C).

    Args:
        x: (B, N, C).
        before: (B, W - 1, C), the inputs before the first.
        weight: (C, 1, W), as of a convolution.
        bias: (C), or None.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or weight.dtype != torch.float32:
        # The kernel's operator is for float32: others keep what autograd and autocast do there.
        return _plain(x, before, weight, bias)
    return _forward_op(x, before, weight, bias)


def _plain(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    seen = torch.cat((before.to(x), x), 1).mT
    return F.silu(F.conv1d(seen, weight, bias, groups=weight.shape[0]).mT)


def _plain_backward(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    # Inside of an operator there is no autograd.
    seen, channels = torch.cat((before, x), 1).mT, weight.shape[0]
    z = F.conv1d(seen, weight, bias, groups=channels)
    dz = torch.ops.aten.silu_backward(grad.mT, z)
    dseen, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, seen, weight, None if bias is None else [channels], [1], [0], [1], False, [0],
        channels, [True, True, bias is not None],
    )  # fmt: skip
    parts = dseen.mT.split((before.shape[1], x.shape[1]), 1)
    dbefore, dx = (t.clone(memory_format=torch.contiguous_format) for t in parts)
    return [dx, dbefore, dweight] if bias is None else [dx, dbefore, dweight, dbias]


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


@torch.library.custom_op("manyheads::short_conv", mutates_args=())
@without_autocast
def _forward_op(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    lib = library("conv", like=x)
    if lib is None:
        return _plain(x, before, weight, bias).contiguous()
    x, before, taps = _rows(x), _rows(before), weight.shape[2]
    y = x.new_empty(x.shape)
    lib("conv_forward", strided(x), strided(before), weight[:, 0].mT.contiguous(), bias, y,
        (*x.shape, taps, torch.get_num_threads()),
        (*x.stride()[:2], *before.stride()[:2]))  # fmt: skip
    return y


@_forward_op.register_fake
def _(x, before, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("manyheads::short_conv_backward", mutates_args=())
@without_autocast
def _backward_op(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor
) -> list[Tensor]:
    """Return the gradients of x, before, weight and, if there is one, bias."""
    taps = weight.shape[2]
    batch, length, channels = x.shape
    lib = library("conv", like=x)
    if lib is None:
        return _plain_backward(x, before, weight, bias, grad)
    x, before, grad = _rows(x), _rows(before), _rows(grad)
    dx, dbefore = x.new_empty(x.shape), before.new_empty(before.shape)
    dweight, dbias = x.new_zeros(batch, taps, channels), x.new_zeros(batch, channels)
    threads = torch.get_num_threads()
    lib("conv_backward", strided(x), strided(before), weight[:, 0].mT.contiguous(), bias,
        strided(grad), dx, dbefore, dweight, dbias, x.new_empty(threads * _SEGMENT * taps),
        (batch, length, channels, taps, threads),
        (*x.stride()[:2], *before.stride()[:2], *grad.stride()[:2]))  # fmt: skip
    found = [dx, dbefore, dweight.sum(0).mT[:, None].contiguous()]
    return found if bias is None else [*found, dbias.sum(0)]


@_backward_op.register_fake
def _(x, before, weight, bias, grad):  # type: ignore[no-untyped-def]
    wanted = (x, before, weight) if bias is None else (x, before, weight, bias)
    return [t.new_empty(t.shape) for t in wanted]


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    found = _backward_op(*ctx.saved_tensors, grad)
    return (*found[:3], found[3] if len(found) > 3 else None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)
