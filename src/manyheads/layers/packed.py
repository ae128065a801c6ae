"""Linear layers and convolutions for inference on an x86 CPU: weights lie as oneDNN reads them.

Equal to torch's up to rounding. What is gained is a tenth or so of the product's time, and the
whole of a GELU, sum or product behind it, which is computed before the result leaves the cache.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.few_rows import Linear
from manyheads.layers.mlp import MLP
from manyheads.layers.precision import is_plain_inference

__all__ = [
    "PackedConv2d",
    "PackedLinear",
    "can_pack",
    "channels_last_weights",
    "pack_linears",
]


def can_pack() -> bool:
    """Return whether this build of torch packs weights on this machine."""
    return (
        platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _Packed(nn.Module):
    """A weight, its packed copies and the conditions under which they are used."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, gelu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.gelu = layer.weight, layer.bias, gelu
        self._packed: dict[object, tuple[tuple[int, int], Tensor]] | None = None

    def _packs(self, x: Tensor, other: Tensor | None = None) -> bool:
        given = (x, self.weight) if other is None else (x, self.weight, other)
        return (
            is_plain_inference(*given)
            and not self.weight.is_inference()
            and x.numel() > 0
            and can_pack()
        )

    def _kept(self, part: object, pack: Callable[[], Tensor]) -> Tensor:
        """Return a part of the weight as ``pack`` makes it, made anew when the weight changes."""
        key = (self.weight.data_ptr(), self.weight._version)
        self._packed = self._packed or {}
        if part not in self._packed or self._packed[part][0] != key:
            self._packed[part] = (key, pack())
        return self._packed[part][1]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}


class PackedLinear(_Packed):
    """act(x Wᵀ + b) for float32 without gradients; anything else runs as nn.Linear would.

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
        if isinstance(linear, nn.Conv2d):
            _check_places(linear)
        super().__init__(linear, gelu)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (..., in) to (..., out); ``residual`` (..., out) is added in the same pass."""
        return self._run(x, residual, "add", 0, 1)

    def cut(self, x: Tensor, index: int, factor: Tensor | None = None) -> Tensor:
        """Map (..., in) by half ``index``, 0 or 1, of the outputs, (..., out / 2).

        It is multiplied by ``factor`` of that shape in the same pass. No copy cuts the halves.
        """
        return self._run(x, factor, "mul", index, 2)

    def _run(self, x: Tensor, other: Tensor | None, how: str, index: int, count: int) -> Tensor:
        matrix, bias = self.weight.flatten(1), self.bias
        if count > 1:
            matrix = matrix.chunk(count)[index]
            bias = None if bias is None else bias.chunk(count)[index]
        if (self.gelu and other is not None) or not self._packs(x, other):
            out = F.linear(x, matrix, bias)
            out = F.gelu(out) if self.gelu else out
            if other is None:
                return out
            return other + out if how == "add" else other * out
        rows = x.numel() // x.shape[-1]
        weight = self._kept(
            (index, count), lambda: torch.ops.mkldnn._reorder_linear_weight(matrix, rows)
        )
        if other is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(
                x, other.contiguous(), weight, bias, how
            )
        act = "gelu" if self.gelu else "none"
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none")

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, gelu={self.gelu}"


class PackedConv2d(_Packed):
    """act(conv(x)) on maps (B, C, H, W) under the conditions of :class:`PackedLinear`.

    Made for channels-last memory: so the packed form's results are.

    Args:
        conv: whose weight, bias and sizes are taken.
        gelu: an exact GELU behind it.

    Raises:
        ValueError: padding by other values than zeros, or by name.

    Example:
        >>> conv, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.ones(1, 8, 5, 5)
        >>> with torch.no_grad():
        ...     torch.allclose(PackedConv2d(conv, gelu=True)(x), F.gelu(conv(x)), atol=1e-6)
        True
    """

    def __init__(self, conv: nn.Conv2d, *, gelu: bool = False) -> None:
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            raise ValueError(
                f"padding {conv.padding!r}, mode {conv.padding_mode!r}: give numbers and 'zeros'"
            )
        super().__init__(conv, gelu)
        self.stride, self.padding = list(conv.stride), list(conv.padding)
        self.dilation, self.groups = list(conv.dilation), conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W)."""
        sizes = (self.stride, self.padding, self.dilation, self.groups)
        if not self._packs(x) or not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
            out = F.conv2d(x, self.weight, self.bias, *sizes)
            return F.gelu(out) if self.gelu else out
        weight = self._kept(
            None,
            lambda: torch.ops.mkldnn._reorder_convolution_weight(
                self.weight, self.padding, self.stride, self.dilation, self.groups, list(x.shape)
            ),
        )
        act = "gelu" if self.gelu else "none"
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, self.bias, self.padding, self.stride, self.dilation, self.groups, act, [],
            "none",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, groups={self.groups}, gelu={self.gelu}"


def pack_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below a module by :class:`PackedLinear`, in place.

    Names of weights stay. In an :class:`MLP` the GELU becomes part of the first layer.
    """
    for parent in list(module.modules()):
        gelu = isinstance(parent, MLP) and parent.act is F.gelu
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and type(child) in (nn.Linear, Linear):
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
