"""Outlook attention with its projections, as a layer and as a mixer on maps (2106.13112).

B batch, H and W rows and columns, h and w of the anchors, C channels, n heads, d = C / n, K side of
a window, s stride.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.outlook.function import outlook
from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer

__all__ = ["OutlookAttention", "OutlookMixer"]


def _softmax(logits: Tensor) -> Tensor:
    """Return the softmax over the last axis, in float32 at least.

    A window has few places, and rows so short leave vector units idle: the axis goes ahead.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    ahead = logits.movedim(-1, -3).contiguous().softmax(-3, dtype=wide)
    return ahead.movedim(-3, -1).to(logits.dtype).contiguous()


class OutlookAttention(nn.Module):
    """Outlook attention with its projections, on channels-last maps (B, H, W, C).

    The weights need C n K⁴ parameters: a layer with many heads or a large K is heavy.

    Args:
        dim: C.
        num_heads: n.
        kernel_size: K, odd unless ``padding`` makes windows and anchors meet.
        padding: as in :func:`outlook`.
        stride: s; anchors are means over s x s places (of the valid ones at the border).
        qkv_bias: of the values' projection.
        scale: factor on the logits; None: d^-0.5.
        attention_dropout, dropout: of the weights, and after the last projection.

    Raises:
        ValueError: C is not a multiple of the heads.

    Example:
        >>> OutlookAttention(24, num_heads=3, stride=2)(torch.randn(2, 9, 6, 24)).shape
        torch.Size([2, 9, 6, 24])
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int = 3,
        padding: int | None = None,
        stride: int = 1,
        qkv_bias: bool = False,
        scale: float | None = None,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if kernel_size < 1 or stride < 1:
            raise ValueError(f"kernel_size {kernel_size} and stride {stride} must be at least 1")
        self.num_heads, self.kernel_size, self.stride = num_heads, kernel_size, stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.scale = (dim // num_heads) ** -0.5 if scale is None else scale
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C)."""
        weights = self.attention_dropout(self.weights(x))
        mixed = outlook(self.v(x), weights, stride=self.stride, padding=self.padding)
        return self.dropout(self.proj(mixed))

    def weights(self, x: Tensor) -> Tensor:
        """Return the weights (B, h, w, n, K², K²) of all windows; softmax in float32 at least."""
        if self.stride > 1:
            x = F.avg_pool2d(
                x.permute(0, 3, 1, 2), self.stride, self.stride, ceil_mode=True
            ).permute(0, 2, 3, 1)
        places = self.kernel_size**2
        logits = self.attn(x).unflatten(3, (self.num_heads, places, places))
        if self.scale != 1:
            logits = logits * self.scale
        return _softmax(logits)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the scale into the weights, in place."""
        self.attn.weight.mul_(self.scale)
        self.attn.bias.mul_(self.scale)
        self.scale = 1.0

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}"


class OutlookMixer(OutlookAttention):
    """:class:`OutlookAttention` on maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _outlook(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    check_options(
        "outlook", options, "kernel_size", "stride", "qkv_bias", "scale", "attention_dropout",
        "dropout",
    )  # fmt: skip
    return OutlookMixer(dim, num_heads=num_heads, **({"stride": 2} | options))


def _flops(s: GridShape) -> int:
    anchors = -(-s.height // 2) * -(-s.width // 2)
    predicted = anchors * s.num_heads * 81 * s.dim
    mixed = anchors * 81 * s.dim
    return 2 * s.batch * (predicted + mixed + 2 * s.tokens * s.dim**2)


register_mixer(
    Mixer(
        name="outlook",
        summary="windows of 3 x 3 mixed by weights that their middle predicts; nothing far",
        paper="volo",
        build=_outlook,
        any_size=True,
        cost="O(N/s² n K⁴ C + N C²)",
        flops=_flops,
        notes=("every second row and column has a window of its own unless stride=1 is given",),
    )
)
