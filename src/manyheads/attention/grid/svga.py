"""SVGA, sparse vision graph attention: every place reads every K-th of its row and column.

B batch, C channels, H and W rows and columns, N = H · W, K the distance of neighbours (``step``).

    m_hw = max(0, max_i x_hw - x_{h-i mod H, w}, max_j x_hw - x_{h, w-j mod W})
    i = K, 2K, ... < H,  j = K, 2K, ... < W

Links wrap around the border, as a torus: where K does not divide H they reach other residues too.
The sign is the centre less the neighbour, as the authors' code has it. Munir et al., "MobileViG",
2307.00395. The graph is fixed, so nothing N x N exists and no neighbours are searched.

max_j (x - x_j) = x - min_j x_j, to the last bit, because rounding is monotone: only minima are
needed. Where K divides H and W all places of a residue class share one minimum, O(C N); otherwise
the minimum over the shifts is built by doubling, O(C N log(H / K)) in place of O(C N H / K).
Gradients differ from the reference's in ties alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.registry import Mixer, register_mixer
from manyheads.layers.conv_norm import ConvNorm

__all__ = ["SVGA", "MaxRelativeConv", "svga", "svga_reference"]


def svga_reference(x: Tensor, *, step: int = 2) -> Tensor:
    """Return the largest differences from linked places (B, C, H, W), link by link.

    Args:
        x: a map (B, C, H, W).
        step: K.

    Raises:
        ValueError: ``x`` is no map, or ``step`` is below 1.
    """
    _check(x, step)
    found = torch.zeros_like(x)
    for dim in (2, 3):
        for shift in range(step, x.shape[dim], step):
            found = torch.maximum(found, x - x.roll(shift, dim))
    return found


def svga(x: Tensor, *, step: int = 2) -> Tensor:
    """Return the largest differences from linked places, linear in the number of places.

    The outputs equal :func:`svga_reference`'s bit for bit; where a row and a column are no longer
    than ``step`` there is no link, and the answer is zero.

    Args:
        x: a map (B, C, H, W).
        step: K, the distance of linked places along rows and columns.

    Raises:
        ValueError: ``x`` is no map, or ``step`` is below 1.

    Example:
        >>> svga(torch.tensor([[[[1.0, 5.0, 2.0, 7.0]]]]), step=2)
        tensor([[[[0., 0., 1., 2.]]]])
    """
    _check(x, step)
    height, width = x.shape[2:]
    if height % step == 0 and width % step == 0:
        # The place itself is in its class and adds a difference of zero, which counts anyway.
        classes = x.unflatten(3, (-1, step)).unflatten(2, (-1, step))
        least = torch.minimum(_least_along(classes, 2), _least_along(classes, 4))
        return F.relu(classes - least).flatten(4).flatten(2, 3)
    linked = [_least_linked(x, dim, step) for dim in (2, 3) if x.shape[dim] > step]
    if not linked:
        return torch.zeros_like(x)
    return F.relu(x - (linked[0] if len(linked) == 1 else torch.minimum(linked[0], linked[1])))


def _check(x: Tensor, step: int) -> None:
    if x.ndim != 4:
        raise ValueError(f"the map has {x.ndim} axes {tuple(x.shape)}, expected (B, C, H, W)")
    if step < 1:
        raise ValueError(f"step {step} must be at least 1, the nearest neighbour")


def _least_along(x: Tensor, dim: int) -> Tensor:
    """Return the minimum along an axis, which keeps size 1, by halves that overlap.

    Several times as fast on a CPU as a reduction along a strided axis.
    """
    count = x.shape[dim]
    while count > 1:
        half = (count + 1) // 2
        x = torch.minimum(x.narrow(dim, 0, half), x.narrow(dim, count - half, half))
        count = half
    return x


def _least_linked(x: Tensor, dim: int, step: int) -> Tensor:
    """Return min_j x shifted by j · step along ``dim``, j = 1, 2, ... while j · step < size."""
    links = (x.shape[dim] - 1) // step
    least, reach = x.roll(step, dim), 1
    while reach < links:
        more = min(reach, links - reach)
        least = torch.minimum(least, least.roll(more * step, dim))
        reach += more
    return least


class MaxRelativeConv(nn.Module):
    """GELU(norm(conv([x, m]))) with m the largest differences of :func:`svga`; C to 2 C channels.

    Args:
        dim: C.
        step: K.
    """

    def __init__(self, dim: int, *, step: int = 2) -> None:
        super().__init__()
        if step < 1:
            raise ValueError(f"step {step} must be at least 1, the nearest neighbour")
        self.step = step
        self.mix = ConvNorm(2 * dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Take a map (B, C, H, W) to (B, 2 C, H, W)."""
        return F.gelu(self.mix(torch.cat((x, svga(x, step=self.step)), 1)))

    def extra_repr(self) -> str:
        return f"step={self.step}"


class SVGA(nn.Module):
    """MobileViG's token mixer: 1 x 1 convolution, max-relative convolution, 1 x 1 convolution.

    Batch norm behind each, so it needs training with batches, and a residual around it. Maps of
    any size; outputs move along when the map is shifted around its borders. O(C² N).

    Args:
        dim: C.
        step: K.

    Raises:
        ValueError: ``step`` is below 1.

    Example:
        >>> SVGA(24)(torch.randn(2, 24, 7, 5)).shape
        torch.Size([2, 24, 7, 5])
    """

    def __init__(self, dim: int, *, step: int = 2) -> None:
        super().__init__()
        self.fc1 = ConvNorm(dim, dim)
        self.graph = MaxRelativeConv(dim, step=step)
        self.fc2 = ConvNorm(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        return self.fc2(self.graph(self.fc1(x)))


def _build(dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any) -> nn.Module:
    check_options("svga", options, "step")
    return SVGA(dim, **options)


register_mixer(
    Mixer(
        name="svga",
        summary="largest differences from every K-th place of row and column; the rest is not seen",
        paper="mobilevig",
        build=_build,
        any_size=True,
        cost="O(N C²)",
        flops=lambda s: 14 * s.batch * s.tokens * s.dim**2,
        notes=("links wrap around the borders", "batch norm inside: needs batches to train"),
    )
)
