"""Linear layers whose weights lie as oneDNN reads them, for inference on an x86 CPU.

Equal to nn.Linear up to rounding. What is gained is a tenth or so of the product's time, and the
whole of a GELU behind it, which is computed before the result leaves the cache.
"""

from __future__ import annotations

import copy
import platform
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.mlp import MLP

__all__ = ["PackedLinear", "can_pack", "channels_last_weights", "pack_linears"]


def can_pack() -> bool:
    """Return whether this build of torch packs weights on this machine."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class PackedLinear(nn.Module):
    """act(x Wᵀ + b) + residual for float32 without gradients; else runs as nn.Linear would.

    The packed copy is made at the first call and anew when the weight changes, so a layer that
    runs holds its weight twice. It is neither saved nor copied; while a graph is traced (compile,
    export) it is not used.

    Args:
        linear: whose weight and bias are taken; or a convolution of 1 x 1, whose weight keeps its
            shape. Channels come last here either way.
        gelu: an exact GELU behind it.

    Raises:
        ValueError: a convolution that does more than a linear layer at each place.

    Example:
        >>> linear = nn.Linear(64, 128)
        >>> with torch.no_grad():
        ...     torch.allclose(PackedLinear(linear)(torch.ones(3, 64)), linear(torch.ones(3, 64)))
        True
    """

    def __init__(self, linear: nn.Linear | nn.Conv2d, *, gelu: bool = False) -> None:
        super().__init__()
        if isinstance(linear, nn.Conv2d):
            _check_places(linear)
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self._packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (..., in) to (..., out); ``residual`` (..., out) is added in the same pass.

        Not both it and a GELU: no layer has that order.
        """
        matrix = self.weight.flatten(1)
        if not self._packs(x, residual):
            out = F.linear(x, matrix, self.bias)
            out = F.gelu(out) if self.gelu else out
            return out if residual is None else residual + out
        key = (self.weight.data_ptr(), self.weight._version)
        if self._packed is None or self._packed[0] != key:
            rows = x.numel() // x.shape[-1]
            self._packed = (key, torch.ops.mkldnn._reorder_linear_weight(matrix, rows))
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, residual.contiguous(), self._packed[1], self.bias, "add"
            )
        act = "gelu" if self.gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, self._packed[1], self.bias, act, [], "none")

    def _packs(self, x: Tensor, residual: Tensor | None) -> bool:
        return (
            (residual is None or (residual.dtype == torch.float32 and not self.gelu))
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not self.weight.is_inference()
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and x.device.type == self.weight.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and x.numel() > 0
            and type(x) is Tensor
            and can_pack()
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, gelu={self.gelu}"


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below a module by :class:`PackedLinear`, in place.

    Names of weights stay. In an :class:`MLP` the GELU becomes part of the first layer.
    """
    for parent in list(module.modules()):
        gelu = isinstance(parent, MLP) and parent.act is F.gelu
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                first = gelu and name == "fc1"
                setattr(parent, name, PackedLinear(child, gelu=first))
                if first:
                    parent.act = _identity  # type: ignore[assignment]


def channels_last_weights(module: nn.Module) -> None:
    """Lay the weights of dense convolutions below a module as maps in channels-last memory need
    them, in place: else every call brings them into that order."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d) and child.groups == 1:
            child.weight.data = child.weight.data.contiguous(memory_format=torch.channels_last)


def _check_places(conv: nn.Conv2d) -> None:
    for name, value, wanted in (
        ("kernel_size", conv.kernel_size, (1, 1)),
        ("stride", conv.stride, (1, 1)),
        ("padding", conv.padding, (0, 0)),
        ("groups", conv.groups, 1),
    ):
        if value != wanted:
            raise ValueError(f"a convolution with {name} {value} is no linear layer: give {wanted}")


def _identity(x: Tensor) -> Tensor:
    return x
