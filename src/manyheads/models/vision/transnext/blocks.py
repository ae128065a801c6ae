"""Parts of TransNeXt on maps (B, C, H, W), which stand in channels-last memory throughout."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.aggregated import AggregatedAttention, LengthScaledAttention
from manyheads.layers.drop_path import DropPath
from manyheads.layers.packed import PackedConv2d, PackedLinear
from manyheads.models.vision.base import run_blocks
from manyheads.models.vision.transnext.config import TransNeXtConfig

__all__ = ["ConvGLU", "PatchEmbed", "Stage", "TransNeXtBlock", "build_stage", "initialise"]


class ConvGLU(nn.Module):
    """W (GELU(DWConv(W_a x)) ⊙ W_v x) on maps (B, C, H, W), depthwise 3 x 3.

    Args:
        dim: C.
        hidden: width that would be an MLP's; two thirds of it are used, rounded down.
        dropout: rate behind the product and behind the output.
    """

    def __init__(self, dim: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        width = int(2 * hidden / 3)
        self.fc1: nn.Linear | PackedLinear = nn.Linear(dim, 2 * width)
        self.dwconv: nn.Conv2d | PackedConv2d = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.fc2: nn.Linear | PackedLinear = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def pack(self) -> None:
        """Pack the weights, in place: for inference alone, without dropout. GELU, product and sum
        are then parts of the layers before them."""
        if isinstance(self.fc1, nn.Linear):
            self.fc1, self.fc2 = PackedLinear(self.fc1), PackedLinear(cast(nn.Linear, self.fc2))
            self.dwconv = PackedConv2d(cast(nn.Conv2d, self.dwconv), gelu=True)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W), and add ``residual`` of that shape to the result."""
        x = x.permute(0, 2, 3, 1)
        # Two products instead of one cut in two: the convolution reads its half without a copy.
        if isinstance(self.fc1, PackedLinear):
            gate = self.dwconv(self.fc1.cut(x, 0).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            rest = None if residual is None else residual.permute(0, 2, 3, 1)
            return self.fc2(self.fc1.cut(x, 1, gate), rest).permute(0, 3, 1, 2)
        (gate_w, value_w), (gate_b, value_b) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        gate = self.dwconv(F.linear(x, gate_w, gate_b).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        product = self.dropout(F.gelu(gate) * F.linear(x, value_w, value_b))
        out = self.dropout(self.fc2(product)).permute(0, 3, 1, 2)
        return out if residual is None else residual + out


class _MapNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map in channels-last memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """A strided convolution and a norm; the map leaves in channels-last memory."""

    def __init__(self, in_channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel, stride, kernel // 2)
        self.norm = _MapNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).contiguous(memory_format=torch.channels_last))


class TransNeXtBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)), on a map (B, C, H, W).

    Args:
        dim: C.
        attn: the attention.
        hidden: of :class:`ConvGLU`.
        drop_path: rate of stochastic depth of both branches.
        dropout: inside the MLP.
        norm_eps: of both norms.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        hidden: int,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = _MapNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = _MapNorm(dim, eps=norm_eps)
        self.mlp = ConvGLU(dim, hidden, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if isinstance(self.mlp.fc1, PackedLinear):
            return self.mlp(self.norm2(x), x)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """A patch embedding, blocks and a norm."""

    def __init__(self, patch_embed: PatchEmbed, blocks: list[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.patch_embed = patch_embed
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        return self.norm(run_blocks(self.blocks, self.patch_embed(x), checkpointing=checkpointing))


def build_stage(c: TransNeXtConfig, index: int) -> Stage:
    dim, before = c.embed_dims[index], sum(c.depths[:index])
    channels = c.in_channels if index == 0 else c.embed_dims[index - 1]
    kernel, stride = (2 * c.patch_size - 1, c.patch_size) if index == 0 else (3, 2)
    common: dict[str, Any] = {
        "num_heads": c.num_heads[index],
        "pretrain_grid": c.pretrain_grid(index),
        "grid": c.grid(index),
        "positions": c.positions,
        "qkv_bias": c.qkv_bias,
        "dropout": c.attention_dropout,
        "proj_dropout": c.dropout,
        "implementation": c.implementation,
    }

    def attention() -> nn.Module:
        if c.sr_ratios[index] == 1:
            return LengthScaledAttention(dim, **common)
        return AggregatedAttention(
            dim,
            window_size=c.window_sizes[index],
            sr_ratio=c.sr_ratios[index],
            fixed_pool_size=c.fixed_pool_size,
            pixel_focused=c.pixel_focused,
            **common,
        )

    blocks: list[nn.Module] = [
        TransNeXtBlock(
            dim,
            attention(),
            hidden=int(dim * c.mlp_ratios[index]),
            drop_path=c.drop_path * (before + j) / max(sum(c.depths) - 1, 1),
            dropout=c.dropout,
            norm_eps=c.norm_eps,
        )
        for j in range(c.depths[index])
    ]
    return Stage(PatchEmbed(channels, dim, kernel, stride), blocks, _MapNorm(dim, eps=c.norm_eps))


def initialise(module: nn.Module) -> None:
    """Truncated normal of 0.02 in linear maps, normal by fan out in convolutions, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2 * module.groups / fan_out))
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
