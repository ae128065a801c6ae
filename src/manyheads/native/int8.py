"""Products of int8 matrices with int32 sums, and codes of floats: operators for any procedure.

M rows, K inputs, O outputs. Inference alone: integers have no gradient. Kernels where they can be
had; elsewhere PyTorch, which multiplies the codes as floats, with the same integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.native.library import Library, library, strided

__all__ = ["int8_encode", "int8_linear", "kernels", "round_half_away"]

_EXACT = 1024  # products of codes whose sum a float32 still holds exactly: 1024 · 2^14 = 2^24


def kernels(like: Tensor) -> Library | None:
    """Return the int8 kernels, or None where they cannot be had or the tensor is elsewhere."""
    return library("int8") if like.device.type == "cpu" else None


def round_half_away(x: Tensor) -> Tensor:
    """Round to the nearest whole number, halves away from zero, as integer kernels do."""
    size = x.abs()
    whole = size.floor()
    return torch.copysign(whole + (size - whole >= 0.5).to(x), x)


def int8_encode(x: Tensor, scale: Tensor) -> Tensor:
    """Return the int8 codes of ``x`` / ``scale``, halves away from zero, clamped to [-128, 127].

    Args:
        x: float32, any shape.
        scale: (1), float32, above 0.

    Returns:
        int8, contiguous, the shape of ``x``.

    Raises:
        ValueError: another dtype, or a scale for each of several parts.

    Example:
        >>> int8_encode(torch.tensor([0.25, -9.0, 99.0]), torch.tensor([0.1]))
        tensor([  3, -90, 127], dtype=torch.int8)
    """
    if x.dtype != torch.float32 or scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(
            f"x and scale must be float32 and scale of one number, got {x.dtype}, {scale.dtype} "
            f"and {tuple(scale.shape)}"
        )
    return _encode_op(x, scale)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    codes: bool = False,
) -> Tensor:
    """Multiply int8 rows by an int8 matrix: y = (x Wᵀ) · scale · row_scale + bias.

    Sums are int32 and exact for K up to 131,072. For int8 output the scale holds the output's:
    scale = s_x · s_w / s_y (and bias is in units of s_y); y is rounded, halves away from zero, and
    clamped to [-128, 127].

    Args:
        x: (..., K), int8.
        weight: (O, K), int8.
        scale: (1) or (O), float32.
        bias: (O), float32, or None.
        row_scale: (...), float32, a further factor of each row (scales made for each token).
        codes: return int8 codes, else float32.

    Returns:
        (..., O), float32 or int8.

    Raises:
        ValueError: dtypes or shapes do not fit.

    Example:
        >>> x = torch.tensor([[1, 2]], dtype=torch.int8)
        >>> w = torch.tensor([[3, -4], [5, 6]], dtype=torch.int8)
        >>> int8_linear(x, w, torch.tensor([0.5]))
        tensor([[-2.5000,  8.5000]])
    """
    _check(x, weight, scale, bias, row_scale)
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    each = None if row_scale is None else row_scale.reshape(-1)
    return _linear_op(rows, weight, scale, bias, each, codes).view(*lead, weight.shape[0])


def _check(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, row_scale: Tensor | None
) -> None:
    if x.dtype != torch.int8 or weight.dtype != torch.int8:
        raise ValueError(f"x and weight must be int8, got {x.dtype} and {weight.dtype}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: need (..., K) and "
            "(O, K)"
        )
    outs = weight.shape[0]
    wanted = (
        ("scale", scale, ((1,), (outs,))),
        ("bias", bias, ((outs,),)),
        ("row_scale", row_scale, (tuple(x.shape[:-1]),)),
    )
    for name, t, shapes in wanted:
        if t is not None and (t.dtype != torch.float32 or tuple(t.shape) not in shapes):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, expected float32 "
                f"{' or '.join(map(str, shapes))}"
            )


@torch.library.custom_op("manyheads::int8_encode", mutates_args=())
def _encode_op(x: Tensor, scale: Tensor) -> Tensor:
    lib = kernels(x)
    if lib is None:
        return round_half_away(x / scale).clamp(-128, 127).to(torch.int8).contiguous()
    out = torch.empty(x.shape, dtype=torch.int8)
    lib("int8_encode", x.contiguous(), out, scale, (x.numel(), torch.get_num_threads()))
    return out


@_encode_op.register_fake
def _(x, scale):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("manyheads::int8_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    codes: bool,
) -> Tensor:
    lib = kernels(x)
    if lib is None:
        return _plain(x, weight, scale, bias, row_scale, codes)
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, inputs = x.shape
    out = torch.empty(rows, len(weight), dtype=torch.int8 if codes else torch.float32)
    fixed = [None if t is None else t.contiguous() for t in (weight, scale, bias, row_scale)]
    lib("int8_linear", strided(x), *fixed, None if codes else out, out if codes else None,
        (rows, inputs, len(weight), x.stride(0), int(scale.numel() > 1),
         torch.get_num_threads()))  # fmt: skip
    return out


@_linear_op.register_fake
def _(x, weight, scale, bias, row_scale, codes):  # type: ignore[no-untyped-def]
    dtype = torch.int8 if codes else torch.float32
    return torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)


def _plain(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    codes: bool,
) -> Tensor:
    sums = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for a, w in zip(x.split(_EXACT, 1), weight.split(_EXACT, 1), strict=True):
        sums += (a.float() @ w.float().mT).to(torch.int32)
    y = sums.float() * scale
    if row_scale is not None:
        y = y * row_scale[:, None]
    if bias is not None:
        y = y + bias
    return round_half_away(y).clamp(-128, 127).to(torch.int8) if codes else y
