"""The gated circular convolution, tile by tile, with a closed-form backward.

B batch, H heads, N length, D head dim. Channels do not meet, so any of them can be worked through
by themselves: a tile's product, spectra and results stay in the processor's cache, and no
spectrum is kept for backward, which makes it again: six real transforms a channel, three forward.
With x = k ⊙ v, y = h * x and e = g ⊙ q, where g is the gradient of q ⊙ y: dq = g ⊙ y,
dx = F⁻¹(conj(F h) F e) and dh = F⁻¹(conj(F x) F e).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast

__all__ = ["TILE_NUMBERS", "gated_conv", "tiles"]

TILE_NUMBERS = 1 << 18
# Sixteen neighbouring float32 channels fill the cache line that is read for one of them.
_LEAST_CHANNELS = 16


def tiles(batch: int, heads: int, length: int, dim: int) -> Iterator[tuple[slice, ...]]:
    """Yield slices of (B, H, :, D) of about ``TILE_NUMBERS`` numbers."""
    channels = min(dim, max(_LEAST_CHANNELS, TILE_NUMBERS // length))
    some_heads = min(heads, max(1, TILE_NUMBERS // (length * dim)))
    rows = max(1, TILE_NUMBERS // (length * dim * heads))
    for b in range(0, batch, rows):
        for h in range(0, heads, some_heads):
            for d in range(0, dim, channels):
                yield (
                    slice(b, min(b + rows, batch)),
                    slice(h, min(h + some_heads, heads)),
                    slice(None),
                    slice(d, min(d + channels, dim)),
                )


def gated_conv(query: Tensor, key: Tensor, value: Tensor, kernel: Tensor, *, norm: str) -> Tensor:
    """Return query ⊙ (kernel * (key ⊙ value)) of four (B, H, N, D) tensors, N at least 1."""
    return _forward_op(query, key, value, kernel, norm)


@torch.library.custom_op("manyheads::gated_circular_conv", mutates_args=())
@without_autocast
def _forward_op(query: Tensor, key: Tensor, value: Tensor, kernel: Tensor, norm: str) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    work, n = torch.promote_types(query.dtype, torch.float32), query.shape[2]
    for tile in tiles(*query.shape):
        q, k, v, h = (t[tile].to(work) for t in (query, key, value, kernel))
        spectrum = torch.fft.rfft((k * v).mT.contiguous(), norm=norm)
        spectrum *= torch.fft.rfft(h.mT.contiguous(), norm=norm)
        out[tile] = torch.fft.irfft(spectrum, n=n, norm=norm).mT * q
    return out


@_forward_op.register_fake
def _(query, key, value, kernel, norm):  # type: ignore[no-untyped-def]
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("manyheads::gated_circular_conv_backward", mutates_args=())
@without_autocast
def _backward_op(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kernel: Tensor, norm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outs = tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (query, key, value, kernel)
    )
    work, n = torch.promote_types(query.dtype, torch.float32), query.shape[2]

    def spectrum(t: Tensor) -> Tensor:
        return torch.fft.rfft(t.mT.contiguous(), norm=norm)

    def back(t: Tensor) -> Tensor:
        return torch.fft.irfft(t, n=n, norm=norm).mT

    dquery, dkey, dvalue, dkernel = outs
    for tile in tiles(*query.shape):
        g, q, k, v, h = (t[tile].to(work) for t in (grad, query, key, value, kernel))
        x, taps, e = spectrum(k * v), spectrum(h), spectrum(g * q)
        dquery[tile] = back(x * taps) * g
        dkernel[tile] = back(x.conj_physical_().mul_(e))
        dx = back(taps.conj_physical_().mul_(e))
        dkey[tile] = dx * v
        dvalue[tile] = dx * k
    return dquery, dkey, dvalue, dkernel


@_backward_op.register_fake
def _(grad, query, key, value, kernel, norm):  # type: ignore[no-untyped-def]
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (query, key, value, kernel)
    )


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.norm = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    return *_backward_op(grad, *ctx.saved_tensors, ctx.norm), None


_forward_op.register_autograd(_backward, setup_context=_context)
