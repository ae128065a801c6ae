"""Parts of MetaFormers on maps (B, C, H, W).

B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid import build_mixer
from manyheads.attention.grid.basic import IdentityMixer, Pooling, SpatialFC
from manyheads.layers.drop_path import DropPath
from manyheads.layers.grid import resize_map
from manyheads.layers.packed import PackedLinear
from manyheads.layers.pool_norm import pool_norm
from manyheads.models.vision.base import run_blocks
from manyheads.models.vision.metaformer.config import MetaFormerConfig

__all__ = [
    "ChannelNorm",
    "ConvMLP",
    "MetaFormerBlock",
    "Stage",
    "build_stage",
    "initialise",
    "make_norm",
]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """Two 1 x 1 convolutions with an exact GELU between, on maps (B, C, H, W)."""

    fc1: nn.Conv2d | PackedLinear
    fc2: nn.Conv2d | PackedLinear

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W), and add ``residual`` of that shape to the result."""
        if isinstance(self.fc1, PackedLinear):
            rest = None if residual is None else residual.permute(0, 2, 3, 1)
            return self.fc2(self.fc1(x.permute(0, 2, 3, 1)), rest).permute(0, 3, 1, 2)
        out = self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))
        return out if residual is None else residual + out

    def pack(self) -> None:
        """Make the convolutions products of places, their weights packed, in place: for inference
        alone, without dropout."""
        if isinstance(self.fc1, nn.Conv2d):
            self.fc1 = PackedLinear(self.fc1, gelu=True)
            self.fc2 = PackedLinear(cast(nn.Conv2d, self.fc2))


def make_norm(kind: str, dim: int, eps: float) -> nn.Module:
    """Return "group" (one group over a map) or "channel"."""
    return nn.GroupNorm(1, dim, eps=eps) if kind == "group" else ChannelNorm(dim, eps=eps)


class MetaFormerBlock(nn.Module):
    """x += s1 · mixer(norm1(x)); x += s2 · mlp(norm2(x)), on a map (B, C, H, W).

    Args:
        dim: C.
        mixer: the token mixer.
        mlp_ratio, norm, layer_scale, dropout, norm_eps: as in :class:`MetaFormerConfig`.
        drop_path: rate of stochastic depth of both branches.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float = 4,
        norm: str = "group",
        layer_scale: float | None = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.folded = False
        self.norm1 = make_norm(norm, dim, norm_eps)
        self.token_mixer = mixer
        self.norm2 = make_norm(norm, dim, norm_eps)
        self.mlp = ConvMLP(dim, int(dim * mlp_ratio), dropout)
        self.drop_path = DropPath(drop_path)
        if layer_scale is None:
            self.register_parameter("layer_scale_1", None)
            self.register_parameter("layer_scale_2", None)
        else:
            self.layer_scale_1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.layer_scale_2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            mixed, normed = self._mixed(x)
            return self.mlp(normed, mixed)
        x = x + self.drop_path(_scaled(self.token_mixer(self.norm1(x)), self.layer_scale_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale_2))

    @torch.no_grad()
    def fold(self) -> None:
        """Move the layer scales into the weights beside them and pack the MLP, in place.

        For inference alone: neither stochastic depth nor dropout is left.
        """
        if self.layer_scale_2 is not None:
            self.mlp.fc2.weight.mul_(self.layer_scale_2[:, None, None, None])
            cast(Tensor, self.mlp.fc2.bias).mul_(self.layer_scale_2)
            self.register_parameter("layer_scale_2", None)
        # Mixers that treat every channel alike and linearly let the scale through to the norm.
        if self.layer_scale_1 is not None and isinstance(
            self.token_mixer, Pooling | IdentityMixer | SpatialFC
        ):
            norm = cast(nn.GroupNorm, self.norm1)
            norm.weight.mul_(self.layer_scale_1)
            norm.bias.mul_(self.layer_scale_1)
            self.register_parameter("layer_scale_1", None)
        self.mlp.pack()
        self.folded = True

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + s1 · mixer(norm1(x)), and the second norm of it."""
        mixer, first, second = self.token_mixer, self.norm1, self.norm2
        if (
            isinstance(mixer, Pooling)
            and isinstance(first, nn.GroupNorm)
            and isinstance(second, nn.GroupNorm)
        ):
            return pool_norm(
                x,
                first.weight,
                second.weight,
                second.bias,
                window=mixer.pool_size,
                eps=first.eps,
                eps_after=second.eps,
            )
        x = x + _scaled(mixer(first(x)), self.layer_scale_1)
        return x, second(x)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale[:, None, None]


class Stage(nn.Module):
    """A strided convolution (but before the first stage), positions where asked, and blocks."""

    def __init__(self, downsample: nn.Module, position: nn.Parameter | None, blocks: list) -> None:
        super().__init__()
        self.downsample = downsample
        self.register_parameter("position", position)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        x = self.downsample(x)
        position = cast(Tensor | None, self.position)
        if position is not None:
            x = x + resize_map(position, (x.shape[2], x.shape[3])).to(x)
        return run_blocks(self.blocks, x, checkpointing=checkpointing)


def build_stage(c: MetaFormerConfig, index: int) -> Stage:
    dim, name, grid = c.embed_dims[index], c.stage_mixers[index], c.grids[index]
    down: nn.Module = nn.Identity()
    if c.has_down(index):
        kernel, stride, padding = c.down
        down = nn.Conv2d(c.embed_dims[index - 1], dim, kernel, stride, padding)
    position = nn.Parameter(torch.zeros(1, dim, *grid)) if c.positions == index else None
    heads = max(dim // 32, 1) if c.num_heads is None else c.num_heads[index]
    total, before = sum(c.depths), sum(c.depths[:index])
    blocks = [
        MetaFormerBlock(
            dim,
            build_mixer(name, dim, num_heads=heads, grid=grid, **c.mixer_options.get(name, {})),
            mlp_ratio=c.mlp_ratios[index],
            norm=c.norm,
            layer_scale=c.layer_scale,
            drop_path=c.drop_path * (before + j) / max(total - 1, 1),
            dropout=c.dropout,
            norm_eps=c.norm_eps,
        )
        for j in range(c.depths[index])
    ]
    return Stage(down, position, blocks)


def initialise(module: nn.Module) -> None:
    """Truncated normal of 0.02 in MLPs and linear maps; other convolutions keep torch's."""
    layers: list[nn.Module] = []
    if isinstance(module, ConvMLP):
        layers = [module.fc1, module.fc2]
    elif isinstance(module, SpatialFC):
        layers = [module.fc]
    for layer in layers:
        weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
        nn.init.trunc_normal_(weight, std=0.02)
        if bias is not None:
            nn.init.zeros_(bias)
