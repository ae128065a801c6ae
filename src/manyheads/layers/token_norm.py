"""Normalisations of tokens by name, aware of padding. B batch, N length, C dim."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import unknown_name
from manyheads.layers.norms import simple_rms_norm

__all__ = ["TOKEN_NORMS", "SimpleRMSNorm", "TokenBatchNorm", "TokenLayerNorm", "token_norm"]

TOKEN_NORMS = ("simplerms", "layer", "batch", "synbatch")


class SimpleRMSNorm(nn.Module):
    """x / (||x|| / sqrt(C) + eps) for each token, without parameters (2210.10340)."""

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return simple_rms_norm(x, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class TokenLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each token."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TokenBatchNorm(nn.Module):
    """Batch norm over all real tokens of a batch, for each channel (1502.03167).

    In training a token's output depends on all tokens of the batch, later ones included; in
    evaluation the running statistics make it a fixed scale and shift.

    Args:
        dim: C.
        sync: whether processes of an initialised process group share their statistics.
        eps: added to the variance.
        momentum: share of the newest batch in the running statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, dim: int, *, sync: bool = False, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        self.dim, self.sync, self.eps, self.momentum = dim, sync, eps, momentum
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Normalise (B, N, C); tokens where ``mask`` (B, N) is False do not count."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            mean, var = self._statistics(x, mask)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x * scale + (self.bias - mean * scale)).to(x.dtype)

    def _statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(0, -2)
        if mask is None:
            count = wide.new_tensor(float(wide.shape[0]))
        else:
            wide = wide.masked_fill(~mask.flatten()[:, None], 0)
            count = mask.sum().clamp_min(1).to(wide.dtype)
        count, total = self._reduce(count), self._reduce(wide.sum(0))
        mean = total / count
        centred = wide - mean
        if mask is not None:
            centred = centred * mask.flatten()[:, None]
        var = self._reduce(centred.square().sum(0)) / count
        with torch.no_grad():
            keep = 1 - self.momentum
            self.running_mean.mul_(keep).add_(mean.to(self.running_mean), alpha=self.momentum)
            unbiased = var * (count / (count - 1).clamp_min(1))
            self.running_var.mul_(keep).add_(unbiased.to(self.running_var), alpha=self.momentum)
        return mean, var

    def _reduce(self, t: Tensor) -> Tensor:
        if not (self.sync and dist.is_available() and dist.is_initialized()):
            return t
        return _AllSum.apply(t)

    def extra_repr(self) -> str:
        return f"{self.dim}, sync={self.sync}, eps={self.eps}, momentum={self.momentum}"


class _AllSum(torch.autograd.Function):
    """The sum over all processes; every process's loss then reaches every process's tensor."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def token_norm(name: str, dim: int, *, eps: float = 1e-8) -> nn.Module:
    """Build a norm that is called as ``norm(x, mask=mask)`` on (B, N, C).

    Args:
        name: "simplerms", "layer", "batch", or "synbatch" (batch norm over all processes).
        dim: C.
        eps: of "simplerms"; the others keep 1e-5.

    Raises:
        ValueError: unknown name; the nearest is given.
    """
    if name == "simplerms":
        return SimpleRMSNorm(eps)
    if name == "layer":
        return TokenLayerNorm(dim)
    if name in ("batch", "synbatch"):
        return TokenBatchNorm(dim, sync=name == "synbatch")
    raise unknown_name("norm", name, TOKEN_NORMS)
