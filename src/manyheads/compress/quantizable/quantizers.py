"""Uniform quantisers, simulated in floating point, with straight-through gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["UniformQuantizer"]

_LEAST_SCALE = 1e-8


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes as if nothing had been done."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class UniformQuantizer(nn.Module):
    """x̂ = s (q − z) with q = clamp(round(x / s) + z): quantise and dequantise. Lossy.

    Nothing gets smaller: it shows what a grid of ``bits`` bits does to a tensor. Inside the range
    the error is at most s / 2. The gradient passes inside the grid and is 0 where values are
    clamped. Scheme of Nagel et al., 2106.08295.

    Args:
        bits: 2 to 16.
        symmetric: zero point 0 and a grid from −2^(bits − 1), or from 0 where nothing is negative;
            else a grid from 0 with a zero point, widened to hold 0.
        per_channel: one range for each index of axis 0.

    Raises:
        ValueError: bits outside 2 to 16.

    Example:
        >>> quantizer = UniformQuantizer(bits=8).set_range(torch.tensor(-1.0), torch.tensor(1.0))
        >>> x = torch.linspace(-1, 1, 9)
        >>> bool((quantizer(x) - x).abs().max() <= quantizer.scale / 2)
        True
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, *, bits: int = 8, symmetric: bool = False, per_channel: bool = False
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"bits {bits} must lie between 2 and 16")
        self.bits, self.symmetric, self.per_channel = bits, symmetric, per_channel
        self.signed = symmetric
        self.register_buffer("scale", torch.tensor(float("nan")))
        self.register_buffer("zero_point", torch.tensor(0.0))

    @property
    def grid(self) -> tuple[int, int]:
        """The least and the largest integer."""
        if self.symmetric and self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def set_range(self, low: Tensor, high: Tensor) -> UniformQuantizer:
        """Set the range of values, scalars or one number a channel; returns self.

        Raises:
            ValueError: low above high, or shapes that do not fit ``per_channel``.
        """
        if low.shape != high.shape or low.ndim > 1 or (low.ndim == 1 and not self.per_channel):
            raise ValueError(
                f"ranges have shapes {tuple(low.shape)} and {tuple(high.shape)}: give two numbers, "
                "or with per_channel=True one pair a channel"
            )
        if bool((low > high).any()):
            raise ValueError("a range starts above its end: give (low, high)")
        if self.symmetric:
            self.signed = bool(low.min() < 0)
            most = torch.maximum(low.abs(), high.abs())
            self.scale = (most / self.grid[1]).clamp_min(_LEAST_SCALE)
            self.zero_point = torch.zeros((), dtype=most.dtype)
        else:
            low, high = low.clamp_max(0), high.clamp_min(_LEAST_SCALE)
            self.scale = ((high - low) / self.grid[1]).clamp_min(_LEAST_SCALE)
            self.zero_point = (-low / self.scale).round().clamp(*self.grid)
        return self

    def to_integers(self, x: Tensor) -> Tensor:
        """Return q, integers held in the dtype of ``x``.

        Raises:
            ValueError: no range was set.
        """
        scale, zero = self._of(x)
        return (_Round.apply(x / scale) + zero).clamp(*self.grid)

    def forward(self, x: Tensor) -> Tensor:
        """Return x̂, of the shape and dtype of ``x``."""
        scale, zero = self._of(x)
        return (self.to_integers(x) - zero) * scale

    def _of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, broadcastable along axis 0."""
        if bool(torch.isnan(self.scale).any()):
            raise ValueError("this quantiser has no range yet: call set_range, or calibrate")
        if self.scale.ndim == 0:
            return self.scale, self.zero_point
        shape = (-1,) + (1,) * (x.ndim - 1)
        zero = self.zero_point
        return (
            self.scale.to(x.dtype).view(shape),
            zero.to(x.dtype).view(shape) if zero.ndim else zero,
        )
