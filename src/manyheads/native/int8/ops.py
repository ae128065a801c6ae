"""The operators behind ``int8_linear`` and its like, and what they run: kernels or PyTorch.

M rows, K inputs, O outputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from manyheads.native.library import Library, library, strided

__all__ = ["encode", "float_linear", "kernels", "linear", "round_half_away"]

_LEAST_SCALE = 1e-8
_MANY_ROWS = 16  # from here on PyTorch's product, which rearranges the weights first, is faster
_EXACT = 1024  # products of codes whose sum a float32 still holds exactly: 1024 · 2^14 = 2^24


def kernels(like: Tensor) -> Library | None:
    """Return the int8 kernels, or None where they cannot be had or the tensor is elsewhere."""
    return library("int8") if like.device.type == "cpu" else None


@cache
def _one_instruction() -> bool:
    """Whether PyTorch's 8-bit product is one instruction here: exact, and faster than floats.

    Processors without it add pairs of products in 16 bits, which clips.
    """
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)())


def _fast_product(x: Tensor) -> bool:
    """Whether PyTorch's 8-bit product is exact for these rows; of one input it is not."""
    return x.device.type == "cpu" and x.shape[1] > 1 and _one_instruction()


def _faster_by_torch(x: Tensor) -> bool:
    return len(x) >= _MANY_ROWS and _fast_product(x)


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest whole number, halves away from zero, as integer kernels do."""
    size = x.abs()
    whole = size.floor()
    return torch.copysign(whole + (size - whole >= 0.5).to(x), x)


@torch.library.custom_op("manyheads::int8_encode", mutates_args=())
def encode(x: Tensor, scale: Tensor) -> Tensor:
    lib = kernels(x)
    if lib is None:
        return round_half_away(x / scale).clamp(-128, 127).to(torch.int8).contiguous()
    out = torch.empty(x.shape, dtype=torch.int8)
    lib("int8_encode", x.contiguous(), out, scale, (x.numel(), torch.get_num_threads()))
    return out


@encode.register_fake
def _(x, scale):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


def _float_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    if input_scale is not None:
        scale = scale * input_scale
    lib = kernels(x)
    if lib is not None and not _faster_by_torch(x):
        out = torch.empty(len(x), len(weight))
        arrays = [
            None if t is None else t.contiguous()
            for t in (x, weight, scale, bias, input_scale, input_zero, offset)
        ]
        lib("int8_float_linear", *arrays, out,
            (*x.shape, len(weight), int(scale.numel() > 1), torch.get_num_threads()))  # fmt: skip
        return out
    codes, row_scale = _encode_rows(x, input_scale, input_zero)
    return _multiply(codes, weight, scale, bias, row_scale, offset, False)


# Defined without custom_op, whose wrapper takes longer than the product of a few tokens.
_LIBRARY = torch.library.Library("manyheads", "FRAGMENT")
_LIBRARY.define(
    "int8_float_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? input_scale, "
    "Tensor? input_zero, Tensor? offset) -> Tensor"
)
_LIBRARY.impl("int8_float_linear", _float_linear, "CompositeExplicitAutograd")
float_linear = torch.ops.manyheads.int8_float_linear.default


@torch.library.register_fake("manyheads::int8_float_linear")
def _(x, weight, scale, bias, input_scale, input_zero, offset):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


def _encode_rows(
    x: Tensor, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the codes (M, K), and the rows' own scales (M) unless one is given."""
    lib = kernels(x)
    if lib is None:
        if scale is not None:
            codes = (x / scale).round_()
            codes = codes if zero is None else codes.add_(zero)
            return codes.clamp_(-128, 127).to(torch.int8), None
        own = x.abs().amax(1, keepdim=True).div_(127).clamp_min_(_LEAST_SCALE)
        return (x / own).round_().to(torch.int8), own[:, 0]
    codes = torch.empty(x.shape, dtype=torch.int8)
    row_scale = torch.empty(len(x)) if scale is None else None
    lib("int8_encode_rows", x.contiguous(), codes, scale, zero, row_scale,
        (*x.shape, torch.get_num_threads()))  # fmt: skip
    return codes, row_scale


def _multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    offset: Tensor | None,
    codes: bool,
) -> Tensor:
    lib = kernels(x)
    if lib is None:
        return _plain(x, weight, scale, bias, row_scale, offset, codes)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, inputs = x.shape
    out = torch.empty(rows, len(weight), dtype=torch.int8 if codes else torch.float32)
    fixed = [None if t is None else t.contiguous() for t in (scale, bias, row_scale, offset)]
    ends = (None if codes else out, out if codes else None)
    each, threads = int(scale.numel() > 1), torch.get_num_threads()
    if _faster_by_torch(x):
        sums = torch._int_mm(x.contiguous(), weight.mT)
        lib("int8_finish", sums, *fixed, *ends, (rows, len(weight), each, threads))
    else:
        lib("int8_linear", strided(x), weight.contiguous(), *fixed, *ends,
            (rows, inputs, len(weight), x.stride(0), each, threads))  # fmt: skip
    return out


linear = torch.library.custom_op("manyheads::int8_linear", _multiply, mutates_args=())


@linear.register_fake
def _(x, weight, scale, bias, row_scale, offset, codes):  # type: ignore[no-untyped-def]
    dtype = torch.int8 if codes else torch.float32
    return torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)


def _plain(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    offset: Tensor | None,
    codes: bool,
) -> Tensor:
    sums = _sums(x, weight)
    y = (sums if offset is None else sums - offset).float() * scale
    if row_scale is not None:
        y = y * row_scale[:, None]
    if bias is not None:
        y = y + bias
    return round_half_away(y).clamp(-128, 127).to(torch.int8) if codes else y


def _sums(x: Tensor, weight: Tensor) -> Tensor:
    if _fast_product(x):
        return torch._int_mm(x.contiguous(), weight.mT)
    sums = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, w in zip(x.split(_EXACT, 1), weight.split(_EXACT, 1), strict=True):
        sums += (a.float() @ w.float().mT).to(torch.int32)
    return sums
