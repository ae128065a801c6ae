"""Normalisations. Statistics are computed in float32 at least, whatever the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["RMSNorm", "simple_rms_norm"]


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis (Zhang and Sennrich, 2019).

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
        affine: whether there is a learned ``weight`` (dim).
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            return F.rms_norm(x, (self.dim,), self.weight, self.eps)
        # torch's own warns of mixed dtypes, as autocast makes them.
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, affine={self.weight is not None}"


def simple_rms_norm(x: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return x / (||x|| / sqrt(C) + eps) over the last axis C, without parameters.

    An all-zero row gives zeros, forward and backward (the norm's subgradient at 0 is 0).
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
    return (wide / (rms + eps)).to(x.dtype)
