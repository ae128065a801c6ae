"""Symmetric quantisation: ranges, scales, observers of activations, and what rounding does.

A number x becomes q = clamp(round(x / s), -2^(b-1), 2^(b-1) - 1) and reads back as q · s. The scale
is s = largest / (2^(b-1) - 1), so that the lowest code is reached by saturation alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.native.int8 import round_half_away

__all__ = [
    "LEAST",
    "AsymmetricObserver",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "absmax_scale",
    "code_range",
    "fake_quant",
    "fake_quant_dynamic",
    "quantise",
]

LEAST = 1e-5
"""The least that a largest value counts as, so that zeros have a scale to divide by."""

_SORTED = 2**24  # torch.quantile refuses more elements than this
Granularity = Literal["tensor", "sample", "token"]


def code_range(bits: int) -> tuple[int, int]:
    """Return the least and the greatest code of ``bits`` bits, two's complement.

    Raises:
        ValueError: fewer than 2 bits or more than 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits {bits} must lie in 2 .. 8")
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def absmax_scale(x: Tensor, *, bits: int = 8) -> Tensor:
    """Return the scale of a whole tensor by its largest magnitude, (1), float32.

    Raises:
        ValueError: a value is not finite.
    """
    largest = x.detach().abs().amax().float() if x.numel() else torch.zeros(())
    if not torch.isfinite(largest):
        raise ValueError("a tensor to quantise holds NaN or infinity: look where it comes from")
    return (largest.clamp_min(LEAST) / code_range(bits)[1]).reshape(1)


def quantise(x: Tensor, scale: Tensor, *, bits: int = 8, half_away: bool = False) -> Tensor:
    """Return the codes of ``x``, int8, same shape.

    Args:
        x: any shape.
        scale: float32, broadcasts with ``x``.
        bits: of a code.
        half_away: halves go away from zero (activations in integer kernels), else to even.
    """
    low, high = code_range(bits)
    ratio = x.float() / scale
    return (round_half_away(ratio) if half_away else ratio.round()).clamp(low, high).to(torch.int8)


def fake_quant(x: Tensor, scale: Tensor, *, base: Tensor | None = None, bits: int = 8) -> Tensor:
    """Return ``x`` as it reads back from its codes. Lossy; halves go to even.

    Args:
        x: any shape.
        scale: float32, broadcasts with ``x``.
        base: whole number added to codes, for a range that is not symmetric (codes then start
            at 0); None: symmetric.
        bits: of a code.

    Example:
        >>> fake_quant(torch.tensor([0.26, -9.0]), torch.tensor([0.1]), bits=4)
        tensor([ 0.3000, -0.8000])
    """
    codes = (x / scale.to(x)).round()
    if base is None:
        return codes.clamp(*code_range(bits)) * scale.to(x)
    return ((codes + base).clamp(0, 2**bits - 1) - base) * scale.to(x)


def fake_quant_dynamic(x: Tensor, *, per: Granularity = "tensor", bits: int = 8) -> Tensor:
    """Quantise with the scale of the data itself and read back. Lossy.

    Args:
        x: (B, ..., C).
        per: what shares a scale: the whole "tensor", a "sample" x[b], a "token" (last axis).
        bits: of a code.

    Raises:
        ValueError: another granularity.
    """
    axes = {
        "tensor": tuple(range(x.ndim)), "sample": tuple(range(1, x.ndim)), "token": (x.ndim - 1,)
    }  # fmt: skip
    if per not in axes:
        raise ValueError(f"per {per!r} is none of: {', '.join(axes)}")
    largest = x.abs().amax(axes[per], keepdim=True).clamp_min(LEAST)
    return fake_quant(x, largest / code_range(bits)[1], bits=bits)


class Observer:
    """Sees the batches of an activation in their order and gives its scale."""

    def __init__(self, *, bits: int = 8) -> None:
        self.bits = bits
        self.largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """See one batch, any shape; padding must have been taken out.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        if not x.numel():
            return
        # float32 as the scales are: half precision would lose small ranges.
        x = x.detach().float()
        if not torch.isfinite(x).all():
            raise ValueError(
                "an activation of the calibration holds NaN or infinity: its scale would too; "
                "check the model and the calibration batches"
            )
        self._see(x)

    def _see(self, x: Tensor) -> None:
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """(1), float32.

        Raises:
            ValueError: nothing was seen.
        """
        if self.largest is None:
            raise ValueError("nothing was observed: calibrate with one batch at least")
        return (self.largest.clamp_min(LEAST) / code_range(self.bits)[1]).reshape(1)


class MinMaxObserver(Observer):
    """The largest magnitude of all batches."""

    def _see(self, x: Tensor) -> None:
        seen = x.abs().amax()
        self.largest = seen if self.largest is None else torch.maximum(self.largest, seen)


class PercentileObserver(Observer):
    """A high quantile of the magnitudes, moved a little by each batch after the first.

    What lies above it is clipped. The order of the batches matters: the first sets the value,
    later ones move it by ``momentum`` of the difference.
    """

    def __init__(self, alpha: float = 0.99999, *, momentum: float = 0.01, bits: int = 8) -> None:
        super().__init__(bits=bits)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha {alpha} must lie in (0, 1]: 0.99999 clips one value in 1e5")
        self.alpha, self.momentum = alpha, momentum

    def _see(self, x: Tensor) -> None:
        seen = _quantile(x.abs().flatten(), self.alpha)
        old = self.largest
        self.largest = seen if old is None else old + self.momentum * (seen - old)


class AsymmetricObserver(Observer):
    """The range between the least and the greatest value, both shrunk by ``clip_ratio``."""

    def __init__(self, clip_ratio: float = 1.0, *, bits: int = 8) -> None:
        super().__init__(bits=bits)
        self.clip_ratio = clip_ratio
        self.least: Tensor | None = None

    def _see(self, x: Tensor) -> None:
        low, high = x.amin(), x.amax()
        self.least = low if self.least is None else torch.minimum(self.least, low)
        self.largest = high if self.largest is None else torch.maximum(self.largest, high)

    @property
    def scale(self) -> Tensor:
        if self.largest is None or self.least is None:
            raise ValueError("nothing was observed: calibrate with one batch at least")
        span = (self.largest - self.least) * self.clip_ratio
        return (span.clamp_min(LEAST) / (2**self.bits - 1)).reshape(1)

    @property
    def base(self) -> Tensor:
        """The code of zero, (1), a whole number."""
        scale = self.scale
        assert self.least is not None
        return (-self.least * self.clip_ratio / scale).round()


def _quantile(x: Tensor, alpha: float) -> Tensor:
    """The quantile by linear interpolation; by order statistics where torch has no room."""
    if x.numel() < _SORTED:
        return torch.quantile(x, alpha)
    place = alpha * (x.numel() - 1)
    below = int(place)
    # Of values above the place there are few: a partial sort of the largest is enough.
    top = x.topk(x.numel() - below).values
    upper = top[-2] if len(top) > 1 else top[-1]
    return torch.lerp(top[-1], upper, place - below)
