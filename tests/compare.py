"""Scale-free comparison, used by all parity tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_close", "relative_error"]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return rms(actual − expected) / rms(expected), in float64."""
    a, e = actual.detach().double(), expected.detach().double()
    scale = e.square().mean().sqrt()
    error = (a - e).square().mean().sqrt()
    return (error / scale.clamp_min(1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, limit: float, what: str = "result") -> None:
    """Fail unless shapes agree, all is finite and the relative error is below ``limit``."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    assert torch.isfinite(actual).all(), f"{what} is not finite"
    error = relative_error(actual, expected)
    assert error <= limit, f"{what}: relative error {error:.2e} above {limit:.0e}"
