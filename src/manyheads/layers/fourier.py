"""Real transforms along the last axis: DFT with a cheap gradient, fast cosine transforms.

N length. ``norm`` as in torch.fft: "backward" (unscaled, the inverse divides by N), "ortho" (both
divide by sqrt(N)) or "forward" (divides by N, the inverse unscaled).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from manyheads.errors import unknown_name

__all__ = ["Norm", "Transform", "check_norm", "dct", "idct", "rfft", "transform_pair"]

Norm = Literal["backward", "ortho", "forward"]
Transform = Literal["fft", "dct", "dct1"]
_OPPOSITE = {"backward": "forward", "ortho": "ortho", "forward": "backward"}


def check_norm(norm: str) -> None:
    """Raise a ValueError unless ``norm`` is one of the three."""
    if norm not in _OPPOSITE:
        raise unknown_name("norm", norm, _OPPOSITE)


def rfft(x: Tensor, *, n: int | None = None, norm: Norm = "backward") -> Tensor:
    """Return what torch.fft.rfft does, (..., n // 2 + 1), with a gradient that is one real FFT.

    torch's own gradient fills the spectrum up and runs a complex transform, four times the work.

    Args:
        x: (..., N) of float32 or float64.
        n: length after padding with zeros (at least N); None for N.
        norm: scaling.
    """
    if n is not None and n != x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, n - x.shape[-1]))
    return _rfft_op(x, norm)


@torch.library.custom_op("manyheads::rfft", mutates_args=())
def _rfft_op(x: Tensor, norm: str) -> Tensor:
    return torch.fft.rfft(x.contiguous(), norm=norm)


@_rfft_op.register_fake
def _(x, norm):  # type: ignore[no-untyped-def]
    bins = x.shape[-1] // 2 + 1
    return x.new_empty((*x.shape[:-1], bins), dtype=x.dtype.to_complex())


@torch.library.custom_op("manyheads::rfft_backward", mutates_args=())
def _rfft_backward_op(grad: Tensor, n: int, norm: str) -> Tensor:
    # The inverse counts each inner bin twice, once for its mirror image; the gradient does not.
    half = grad.clone(memory_format=torch.contiguous_format)
    half[..., 1 : (n + 1) // 2] *= 0.5
    return torch.fft.irfft(half, n=n, norm=_OPPOSITE[norm])


@_rfft_backward_op.register_fake
def _(grad, n, norm):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], n), dtype=grad.dtype.to_real())


def _rfft_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ctx.norm = inputs
    ctx.length = x.shape[-1]


def _rfft_grad(ctx, grad):  # type: ignore[no-untyped-def]
    return _rfft_backward_op(grad, ctx.length, ctx.norm), None


_rfft_op.register_autograd(_rfft_grad, setup_context=_rfft_context)


def dct(x: Tensor, *, norm: Norm = "ortho") -> Tensor:
    """Discrete cosine transform II, 2 Σ_j x_j cos(π k (2j + 1) / 2N), by one real FFT.

    "ortho" scales it to an orthogonal matrix; "forward" divides by 2N.
    """
    n = x.shape[-1]
    z = rfft(torch.cat((x[..., ::2], x[..., 1::2].flip(-1)), -1)) * _twist(x, n)
    tail = z.imag[..., 1 : (n + 1) // 2].flip(-1)
    y = torch.cat((2 * z.real, -2 * tail), -1)
    return y * _dct_scale(x, n, norm)


def idct(y: Tensor, *, norm: Norm = "ortho") -> Tensor:
    """Undo :func:`dct` of the same norm."""
    n = y.shape[-1]
    y = y / _dct_scale(y, n, norm)
    bins = n // 2 + 1
    mirrored = torch.cat((torch.zeros_like(y[..., :1]), y.flip(-1)), -1)[..., :bins]
    z = torch.complex(y[..., :bins], -mirrored) * (0.5 * _twist(y, n).conj())
    v = torch.fft.irfft(z, n=n)
    index = torch.arange(n, device=y.device)
    index = torch.where(index % 2 == 0, index // 2, n - 1 - index // 2)
    return v.index_select(-1, index)


def _twist(x: Tensor, n: int) -> Tensor:
    angle = torch.arange(n // 2 + 1, device=x.device, dtype=torch.float64) * (-math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle).to(x.dtype.to_complex())


def _dct_scale(x: Tensor, n: int, norm: Norm) -> Tensor:
    scale = torch.ones(n, device=x.device, dtype=x.dtype)
    if norm == "ortho":
        first = torch.arange(n, device=x.device) == 0
        return torch.where(first, scale * (4 * n) ** -0.5, scale * (2 * n) ** -0.5)
    return scale / (2 * n) if norm == "forward" else scale


def _dct1(x: Tensor) -> Tensor:
    if x.shape[-1] < 2:
        raise ValueError("length 1 has no cosine transform I: use transform='dct'")
    return rfft(torch.cat((x, x[..., 1:-1].flip(-1)), -1)).real


def transform_pair(
    transform: Transform, norm: Norm
) -> tuple[Callable[[Tensor, int], Tensor], Callable[[Tensor, int], Tensor]]:
    """Return a transform along the last axis and its inverse, both called as f(x, length).

    "fft" pads to ``length`` on the way in and returns ``length`` on the way out; the cosine
    transforms "dct" (II) and "dct1" keep the length they are given.

    Raises:
        ValueError: an unknown transform or norm, or a norm that "dct1" does not have.
    """
    check_norm(norm)
    if transform == "fft":
        return (
            lambda x, n: rfft(x, n=n, norm=norm),
            lambda y, n: torch.fft.irfft(y, n=n, norm=norm),
        )
    if transform == "dct":
        return lambda x, n: dct(x, norm=norm), lambda y, n: idct(y, norm=norm)
    if transform == "dct1":
        if norm != "backward":
            raise ValueError(f"norm {norm!r} is not there for 'dct1': use norm='backward'")
        return lambda x, n: _dct1(x), lambda y, n: _dct1(y) / (2 * (y.shape[-1] - 1))
    raise unknown_name("transform", transform, ("fft", "dct", "dct1"))
