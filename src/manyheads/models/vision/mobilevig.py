"""MobileViG: inverted residuals on large maps, a sparse graph of places on the last (2307.00395).

B batch, C channels, H and W rows and columns.

Local blocks: x += s · mlp(x), an MLP of 1 x 1 convolutions with a depthwise 3 x 3 between. Global
blocks: x += svga(x); x += mlp(x). Munir, Avery, Marculescu, "MobileViG: Graph-Based Sparse
Attention for Mobile Vision Applications". Images of any size: the graph is relative.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.svga import SVGA
from manyheads.config import Config
from manyheads.layers.conv_norm import ConvNorm, ConvNormMLP, conv_norm_keys
from manyheads.layers.drop_path import DropPath
from manyheads.layers.keymap import Entry, KeyMap, convert, rename
from manyheads.models.base import register_variants
from manyheads.models.vision.base import run_blocks
from manyheads.models.vision.two_heads import TwoHeadModel

__all__ = ["GraphBlock", "InvertedResidual", "MobileViG", "MobileViGConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MobileViGConfig(Config):
    """Sizes of a :class:`MobileViG`; the defaults are Ti's.

    Attributes:
        local_depths, local_dims: blocks and channels of the stages of inverted residuals.
        global_depths, global_dims: of the stages with the graph.
        head_dim: channels between pooling and classifiers.
        step: distance of linked places, the paper's K.
        mlp_ratio: hidden channels of every MLP over its channels.
        in_channels, num_classes: of the images; 0 classes for features alone.
        distillation: two classifiers, averaged in use.
        layer_scale: first value of s.
        drop_path: rate of the last block, the others' rise linearly to it.
        dropout: in the local MLPs and before the classifiers.
    """

    local_depths: tuple[int, ...] = (2, 2, 6)
    local_dims: tuple[int, ...] = (42, 84, 168)
    global_depths: tuple[int, ...] = (2,)
    global_dims: tuple[int, ...] = (256,)
    head_dim: int = 512
    step: int = 2
    mlp_ratio: float = 4
    in_channels: int = 3
    num_classes: int = 1000
    distillation: bool = True
    layer_scale: float = 1e-5
    drop_path: float = 0.1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for kind in ("local", "global"):
            dims, depths = getattr(self, f"{kind}_dims"), getattr(self, f"{kind}_depths")
            if len(dims) != len(depths):
                raise ValueError(f"{kind}_dims names {len(dims)} stages, {kind}_depths "
                                 f"{len(depths)}")  # fmt: skip
        if not self.local_depths:
            raise ValueError("local_depths names no stage: give at least one, the stem's width")
        if self.step < 1:
            raise ValueError(f"step {self.step} must be at least 1, the nearest neighbour")

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of all stages."""
        return self.local_depths + self.global_depths

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of all stages."""
        return self.local_dims + self.global_dims


class InvertedResidual(nn.Module):
    """x += s · mlp(x) with a depthwise convolution in the MLP, on a map (B, C, H, W)."""

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4,
        layer_scale: float = 1e-5,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.mlp = ConvNormMLP(dim, int(dim * mlp_ratio), depthwise=True, dropout=dropout)
        self.layer_scale = nn.Parameter(torch.full((dim,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        if self.layer_scale is not None:
            y = y * self.layer_scale[:, None, None]
        return x + self.drop_path(y)

    def fold(self) -> None:
        """Move the layer scale into the last convolution, in place: for inference alone."""
        self.mlp.fc2.fold(self.layer_scale)
        self.register_parameter("layer_scale", None)


class GraphBlock(nn.Module):
    """x += svga(x); x += mlp(x), on a map (B, C, H, W)."""

    def __init__(
        self, dim: int, *, step: int = 2, mlp_ratio: float = 4, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.token_mixer = SVGA(dim, step=step)
        self.mlp = ConvNormMLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.token_mixer(x))
        return x + self.drop_path(self.mlp(x))


class Stage(nn.Module):
    """A strided convolution (but before the first stage) and blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, checkpointing: bool) -> Tensor:
        return run_blocks(self.blocks, self.downsample(x), checkpointing=checkpointing)


class MobileViG(TwoHeadModel):
    """A backbone of inverted residuals with sparse graph attention on the last maps.

    Example:
        >>> model = MobileViG(MobileViGConfig(local_depths=(1, 1, 1), num_classes=10)).eval()
        >>> model(torch.randn(1, 3, 96, 150)).shape
        torch.Size([1, 10])
    """

    config_class: ClassVar[type[Config]] = MobileViGConfig
    config: MobileViGConfig

    def __init__(self, config: MobileViGConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.dims[-1]
        first = c.dims[0]
        self.stem = nn.Sequential(
            ConvNorm(c.in_channels, first // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(first // 2, first, 3, stride=2),
            nn.GELU(),
        )
        self.stages = nn.ModuleList(_stage(c, i) for i in range(len(c.depths)))
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(c.dims)
        ]
        self.head_conv = ConvNorm(c.dims[-1], c.head_dim)
        self.head_drop = nn.Dropout(c.dropout)
        self.apply(_initialise)
        self.make_heads()

    @property
    def head_hidden_size(self) -> int:
        return self.config.head_dim

    def make_classifier(self, num_classes: int) -> nn.Module:
        head = super().make_classifier(num_classes)
        # The classifiers are convolutions in the authors' code and start as all others do.
        _initialise(head)
        return head

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, self.grad_checkpointing)
            yield x

    def finish(self, x: Tensor) -> Tensor:
        return x

    def pool(self, x: Tensor) -> Tensor:
        x = F.gelu(self.head_conv(x.mean((2, 3), keepdim=True)))
        return self.head_drop(x).flatten(1)

    def key_map(self) -> KeyMap:
        """Names of SLDGroup/MobileViG: blocks and convolutions between count in one list."""
        c = self.config
        entries = conv_norm_keys("stem.0", "stem.stem.0", "stem.stem.1")
        entries += conv_norm_keys("stem.2", "stem.stem.3", "stem.stem.4")
        place, part = 0, "local_backbone"
        for i, depth in enumerate(c.depths):
            if i:
                # What leads into the graph's first stage is still counted as local.
                entries += pair_keys(f"stages.{i}.downsample", f"{part}.{place}.conv")
                place += 1
            is_local = i < len(c.local_depths)
            if i == len(c.local_depths):
                place, part = 0, "backbone"
            for j in range(depth):
                ours, official = f"stages.{i}.blocks.{j}.", f"{part}.{place}."
                entries += (local_block_keys if is_local else graph_block_keys)(ours, official)
                place += 1
        entries += conv_norm_keys("head_conv", "prediction.1", "prediction.2")
        for ours, official in (("head", "head"), ("head_dist", "dist_head")):
            entries.append(
                convert(
                    f"{ours}.weight", f"{official}.weight",
                    lambda t: t.flatten(1), lambda t: t[:, :, None, None],
                )
            )  # fmt: skip
            entries.append(rename(f"{ours}.bias", f"{official}.bias"))
        return KeyMap(*entries)


def pair_keys(ours: str, official: str) -> list[Entry]:
    return conv_norm_keys(ours, f"{official}.0", f"{official}.1")


def local_block_keys(ours: str, official: str) -> list[Entry]:
    entries = [
        convert(
            ours + "layer_scale", official + "layer_scale_2",
            lambda t: t.flatten(), lambda t: t[:, None, None],
        )
    ]  # fmt: skip
    for name, norm in (("fc1", "norm1"), ("mid", "mid_norm"), ("fc2", "norm2")):
        entries += conv_norm_keys(
            f"{ours}mlp.{name}", f"{official}mlp.{name}", f"{official}mlp.{norm}"
        )
    return entries


def graph_block_keys(ours: str, official: str) -> list[Entry]:
    entries = pair_keys(f"{ours}token_mixer.graph.mix", f"{official}0.graph_conv.nn")
    for name in ("fc1", "fc2"):
        entries += pair_keys(f"{ours}token_mixer.{name}", f"{official}0.{name}")
        entries += pair_keys(f"{ours}mlp.{name}", f"{official}1.{name}")
    return entries


def _stage(c: MobileViGConfig, index: int) -> Stage:
    dim, before = c.dims[index], sum(c.depths[:index])
    down: nn.Module = nn.Identity()
    if index:
        down = ConvNorm(c.dims[index - 1], dim, 3, stride=2)
    blocks: list[nn.Module] = []
    for j in range(c.depths[index]):
        rate = c.drop_path * (before + j) / max(sum(c.depths) - 1, 1)
        if index < len(c.local_depths):
            blocks.append(
                InvertedResidual(
                    dim,
                    mlp_ratio=c.mlp_ratio,
                    layer_scale=c.layer_scale,
                    drop_path=rate,
                    dropout=c.dropout,
                )
            )
        else:
            blocks.append(GraphBlock(dim, step=c.step, mlp_ratio=c.mlp_ratio, drop_path=rate))
    return Stage(down, blocks)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(cast(Tensor, module.bias))


def _config(
    local: tuple[int, int, int], widths: tuple[int, ...], head_dim: int, depth: int
) -> MobileViGConfig:
    return MobileViGConfig(
        local_depths=local,
        local_dims=widths[:3],
        global_depths=(depth,),
        global_dims=widths[3:],
        head_dim=head_dim,
    )


_TABLE: Mapping[str, tuple[MobileViGConfig, tuple[str, ...]]] = {
    "mobilevig_ti": (_config((2, 2, 6), (42, 84, 168, 256), 512, 2), ("mobilevig",)),
    "mobilevig_s": (_config((3, 3, 9), (42, 84, 176, 256), 512, 3), ()),
    "mobilevig_m": (_config((3, 3, 9), (42, 84, 224, 400), 768, 3), ()),
    "mobilevig_b": (_config((5, 5, 15), (42, 84, 240, 464), 768, 5), ()),
}
register_variants(MobileViG, "mobilevig", _TABLE)
