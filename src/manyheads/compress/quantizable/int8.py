"""A linear layer whose weight is held, and multiplied, as 8-bit integers.

y = s_x s_w (q_x q_wᵀ) + b with int32 sums. In features, out features: C, O; M rows of input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.native import int8_float_linear

__all__ = ["Int8Linear", "quantize_weight"]

_LEAST_SCALE = 1e-8


def quantize_weight(weight: Tensor, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 values and scales (O,) of a weight (O, C), one scale a row.

    Args:
        weight: floating point.
        most: (O,) the largest magnitude of each row's grid; None for that of the row.
    """
    wide = weight.detach().float()
    most = wide.abs().amax(1) if most is None else most.float()
    scale = (most / 127).clamp_min(_LEAST_SCALE)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """x Wᵀ + b in 8-bit integers, one scale an output. Lossy; for inference.

    The input is quantised by each token's own largest magnitude, or with a fixed range. On a CPU
    the product runs in integers; elsewhere, and for gradients with respect to the input, with the
    weight turned back into floating point. The weight itself is not trained.

    Args:
        in_features, out_features: sizes.
        bias: whether there is one.
        static: whether the input has a fixed range, set by :meth:`set_range`.
        act: applied to the output.

    Example:
        >>> layer = Int8Linear.from_float(torch.nn.Linear(64, 48))
        >>> layer(torch.randn(2, 10, 64)).shape, layer.weight_int8.dtype
        (torch.Size([2, 10, 48]), torch.int8)
    """

    weight_int8: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero: Tensor
    weight_sums: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        static: bool = False,
        act: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.static, self.act = static, act
        zeros = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.register_buffer("weight_int8", zeros)
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if static:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero", torch.zeros((), dtype=torch.int32))
            self.register_buffer("weight_sums", torch.zeros(out_features, dtype=torch.int32))

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        transposed: bool = False,
        most: Tensor | None = None,
        input_range: tuple[Tensor, Tensor] | None = None,
    ) -> Int8Linear:
        """Build from a Linear.

        Args:
            module: with ``weight`` (O, C), and ``bias`` or None.
            transposed: the weight is (C, O), as in transformers' Conv1D.
            most: see :func:`quantize_weight`.
            input_range: the least and largest number of the input, for a fixed range.
        """
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        weight = weight.detach().T if transposed else weight.detach()
        layer = cls(
            weight.shape[1], weight.shape[0], bias=bias is not None,
            static=input_range is not None, act=getattr(module, "act", None),
        )  # fmt: skip
        layer.to(weight.device)
        layer.weight_int8, layer.weight_scale = quantize_weight(weight, most)
        if isinstance(bias, Tensor):
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        if input_range is not None:
            layer.set_range(*input_range)
        return layer.train(module.training)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Fix the range of the input; it is widened to hold 0."""
        low, high = low.float().clamp_max(0), high.float().clamp_min(0)
        scale = ((high - low) / 255).clamp_min(_LEAST_SCALE)
        self.input_scale = scale.to(self.weight_int8.device)
        zero = (-low / scale).round().clamp(0, 255) - 128
        self.input_zero = zero.to(self.weight_int8.device, torch.int32)
        self.weight_sums = self.weight_int8.sum(1, dtype=torch.int32)

    @property
    def weight(self) -> Tensor:
        """The weight in floating point, made anew each time: (O, C)."""
        return self.weight_int8.to(self.weight_scale.dtype) * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows, bias = x.reshape(-1, self.in_features), self.bias
        trained = bias is not None and bias.requires_grad
        if torch.is_grad_enabled() and (rows.requires_grad or trained):
            out = _StraightThrough.apply(rows, self)
            if bias is not None:
                out = out + bias
        else:
            out = self._product(rows, bias)
        out = out.to(x.dtype).reshape(*x.shape[:-1], self.out_features)
        return out if self.act is None else self.act(out)

    def _product(self, rows: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return rows Wᵀ (M, O), and the bias added, in float32."""
        rows, bias = rows.float(), None if bias is None else bias.float()
        if rows.device.type != "cpu":
            return F.linear(self._rounded(rows), self.weight.float(), bias)
        fixed = {}
        if self.static:
            fixed = {
                "input_scale": self.input_scale.float(),
                "input_zero": self.input_zero,
                "weight_sums": self.weight_sums,
            }
        return int8_float_linear(
            rows, self.weight_int8, self.weight_scale.float(), bias=bias, **fixed
        )

    def _rounded(self, rows: Tensor) -> Tensor:
        """Return the input as its integers stand for it."""
        if self.static:
            scale, zero = self.input_scale.float(), self.input_zero
            return ((rows / scale).round().add(zero).clamp(-128, 127) - zero) * scale
        scale = _token_scale(rows)
        return (rows / scale).round() * scale

    def extra_repr(self) -> str:
        kind = "static" if self.static else "per token"
        return f"in_features={self.in_features}, out_features={self.out_features}, inputs {kind}"


def _token_scale(rows: Tensor) -> Tensor:
    return rows.abs().amax(1, keepdim=True).div_(127).clamp_min_(_LEAST_SCALE)


class _StraightThrough(torch.autograd.Function):
    """The product in integers; its gradient is that of the product in floating point."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, rows.dtype
        return layer._product(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] @ ctx.layer.weight.to(grads[0].dtype)).to(ctx.dtype), None
