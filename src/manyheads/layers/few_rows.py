"""Linear layers that read their weights once for a few tokens, as a decoding step has them.

Equal to nn.Linear up to rounding. A step waits for its weights to come from memory, and BLAS
fetches them at half the pace that memory has or less: ``quickened_decode`` of ``manyheads bench``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.precision import is_plain_inference
from manyheads.native import library

__all__ = ["FEW_ROWS", "Linear", "linear", "quicken"]

FEW_ROWS = 8
_LEAST = 1 << 12  # numbers of a weight: below, a call costs as much as the product


class Linear(nn.Linear):
    """nn.Linear, faster on up to eight rows of float32 on a CPU without gradients.

    Anything else, and whatever is traced, compiled or watched, runs as nn.Linear does.

    Example:
        >>> layer = Linear(512, 256)
        >>> with torch.no_grad():
        ...     layer(torch.randn(1, 512)).shape
        torch.Size([1, 256])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


def quicken(module: nn.Module) -> int:
    """Let every nn.Linear in a module be a :class:`Linear`, in place; return how many there were.

    For models that are not of this library: a token of a Llama of transformers waits for the same
    weights. Names, weights, training and saving stay as they are. Subclasses of nn.Linear are
    left alone.

    Example:
        >>> quicken(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
        2
    """
    found = [m for m in module.modules() if type(m) is nn.Linear]
    for one in found:
        one.__class__ = Linear
    return len(found)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b: (..., O), for x (..., K), weight (O, K) and bias (O) or None."""
    if (
        not is_plain_inference(x, weight)
        or x.numel() > FEW_ROWS * weight.shape[1]
        or weight.numel() < _LEAST
        or (kernel := _kernel()) is None
        or x.shape[-1] != weight.shape[1]
        or not weight.is_contiguous()
        or not (bias is None or bias.is_contiguous())
    ):
        return F.linear(x, weight, bias)
    outputs, inputs = weight.shape
    rows, x = x.numel() // inputs, x.contiguous()
    out = x.new_empty((*x.shape[:-1], outputs))
    kernel(
        x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(),
        out.data_ptr(), rows, inputs, outputs, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _kernel() -> Callable[..., None] | None:
    lib = library("rows")
    return None if lib is None else lib.bind("rows_linear", pointers=4, integers=4)
