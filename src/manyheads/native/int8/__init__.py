"""Products of int8 matrices with int32 sums, and codes of floats: operators for any procedure.

M rows, K inputs, O outputs. Inference alone: integers have no gradient. Kernels where they can be
had, elsewhere PyTorch, with the same numbers to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.native.int8.ops import encode, float_linear, kernels, linear, round_half_away

__all__ = ["int8_encode", "int8_float_linear", "int8_linear", "kernels", "round_half_away"]


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
    return encode(x, scale)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    row_scale: Tensor | None = None,
    offset: Tensor | None = None,
    codes: bool = False,
) -> Tensor:
    """Multiply int8 rows by an int8 matrix: y = (x Wᵀ − offset) · scale · row_scale + bias.

    Sums are int32 and exact for K up to 131,072, with an offset 65,536. For int8 output the scale
    holds the output's: scale = s_x · s_w / s_y (and bias is in units of s_y); y is rounded, halves
    away from zero, and clamped to [-128, 127].

    Args:
        x: (..., K), int8.
        weight: (O, K), int8.
        scale: (1) or (O), float32.
        bias: (O), float32, or None.
        row_scale: (...), float32, a further factor of each row (scales made for each token).
        offset: (O), int32, such as the zero point of x times the sum of each row of the weight.
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
    _check(x, torch.int8, weight, scale, bias, row_scale, offset)
    lead = x.shape[:-1]
    rows = x.reshape(-1, x.shape[-1])
    each = None if row_scale is None else row_scale.reshape(-1)
    return linear(rows, weight, scale, bias, each, offset, codes).view(*lead, weight.shape[0])


def int8_float_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
    weight_sums: Tensor | None = None,
) -> Tensor:
    """Multiply float rows, encoded on the way, by an int8 matrix. Lossy.

    y = s_x (q − z) Wᵀ · scale + bias, where q is x / s_x + z, rounded (halves to even) and clamped
    to [-128, 127]. Without a scale for the input each row has its own, its largest magnitude over
    127, and no zero point.

    Args:
        x: (..., K), float32.
        weight: (O, K), int8.
        scale: (1) or (O), float32, of the weight.
        bias: (O), float32, or None.
        input_scale: one number, float32, above 0, or None.
        input_zero: one number, int32, with ``input_scale`` alone; None for 0.
        weight_sums: (O), int32, of each row of the weight; with ``input_zero``, else they are
            added up at every call.

    Returns:
        (..., O), float32.

    Raises:
        ValueError: dtypes or shapes do not fit, or a zero point without a scale.

    Example:
        >>> w = torch.tensor([[3, -4], [5, 6]], dtype=torch.int8)
        >>> int8_float_linear(torch.tensor([[12.7, 0.0]]), w, torch.tensor([0.1]))
        tensor([[3.8100, 6.3500]])
    """
    _check(x, torch.float32, weight, scale, bias, None, None)
    if input_scale is None and input_zero is not None:
        raise ValueError("input_zero is a code of input_scale's: give input_scale too")
    for name, t, dtype in (
        ("input_scale", input_scale, torch.float32),
        ("input_zero", input_zero, torch.int32),
    ):
        if t is not None and (t.dtype != dtype or t.numel() != 1):
            raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)}, expected one {dtype}")
    offset = None
    if input_zero is not None:
        sums = weight.sum(1, dtype=torch.int32) if weight_sums is None else weight_sums
        if sums.dtype != torch.int32 or sums.shape != weight.shape[:1]:
            raise ValueError(
                f"weight_sums is {sums.dtype} {tuple(sums.shape)}, expected torch.int32 "
                f"({weight.shape[0]},)"
            )
        offset = sums * input_zero
    rows = x.reshape(-1, x.shape[-1])
    out = float_linear(rows, weight, scale, bias, input_scale, input_zero, offset)
    return out.view(*x.shape[:-1], weight.shape[0])


def _check(
    x: Tensor,
    dtype: torch.dtype,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    offset: Tensor | None,
) -> None:
    if x.dtype != dtype or weight.dtype != torch.int8:
        kinds = "int8" if dtype == torch.int8 else "float32 and int8"
        raise ValueError(f"x and weight must be {kinds}, got {x.dtype} and {weight.dtype}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: need (..., K) and "
            "(O, K)"
        )
    outs = weight.shape[0]
    wanted = (
        ("scale", scale, torch.float32, ((1,), (outs,))),
        ("bias", bias, torch.float32, ((outs,),)),
        ("row_scale", row_scale, torch.float32, (tuple(x.shape[:-1]),)),
        ("offset", offset, torch.int32, ((outs,),)),
    )
    for name, t, kind, shapes in wanted:
        if t is not None and (t.dtype != kind or tuple(t.shape) not in shapes):
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}, expected {kind} "
                f"{' or '.join(map(str, shapes))}"
            )
