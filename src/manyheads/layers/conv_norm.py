"""A convolution with a batch norm behind it, which folds into it for inference. C channels."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.keymap import Entry, rename

__all__ = ["ConvNorm", "ConvNormMLP", "conv_norm_keys"]


class ConvNorm(nn.Module):
    """norm(conv(x)) on maps (B, C, H, W), with padding of half the kernel.

    Args:
        dim, out: channels read and returned.
        kernel, stride, groups: of the convolution.
    """

    def __init__(
        self, dim: int, out: int, kernel: int = 1, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups)
        self.norm: nn.Module = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    @torch.no_grad()
    def fold(self, scale: Tensor | None = None) -> None:
        """Move the norm's running statistics, and a scale (C) behind it, into the convolution.

        In place, for inference alone; done twice, the second time has only the scale to move.
        """
        conv, bias = self.conv, cast(Tensor, self.conv.bias)
        if isinstance(self.norm, nn.BatchNorm2d):
            norm = self.norm
            mean, var = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
            # In float64, so that folding costs no more than the last rounding.
            factor = norm.weight.double() * (var.double() + norm.eps).rsqrt()
            bias.copy_((bias.double() - mean.double()) * factor + norm.bias.double())
            conv.weight.copy_(conv.weight.double() * factor[:, None, None, None])
            self.norm = nn.Identity()
        if scale is not None:
            conv.weight.mul_(scale[:, None, None, None])
            bias.mul_(scale)


class ConvNormMLP(nn.Module):
    """Two 1 x 1 convolutions on maps, a batch norm behind each, an exact GELU between.

    Args:
        dim, hidden: channels outside and inside.
        depthwise: a 3 x 3 convolution a channel in the middle, with norm and GELU of its own: an
            inverted residual block's branch.
        dropout: behind the last GELU and at the end.
    """

    def __init__(
        self, dim: int, hidden: int, *, depthwise: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, hidden)
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden) if depthwise else None
        self.fc2 = ConvNorm(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        if self.mid is not None:
            x = F.gelu(self.mid(x))
        return self.dropout(self.fc2(self.dropout(x)))


def conv_norm_keys(ours: str, conv: str, norm: str) -> list[Entry]:
    """Return the key map of a ConvNorm whose two parts have these official names."""
    entries = [rename(f"{ours}.conv.{n}", f"{conv}.{n}") for n in ("weight", "bias")]
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return entries + [rename(f"{ours}.norm.{n}", f"{norm}.{n}") for n in names]
