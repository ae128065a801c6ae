"""MetaFormer and PoolFormer: a four-stage backbone whose token mixer is a slot (2111.11418).

B batch, C channels, H and W rows and columns.

x += s1 · mixer(norm(x)); x += s2 · mlp(norm(x)) on maps (B, C, H, W), a strided convolution before
every stage. Yu et al., "MetaFormer Is Actually What You Need for Vision". Official numerics: the
last norm is taken over the map and then averaged; ``head_norm="timm"`` averages first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid import build_mixer
from manyheads.attention.grid.basic import IdentityMixer, Pooling, SpatialFC
from manyheads.config import Config
from manyheads.layers.drop_path import DropPath
from manyheads.layers.grid import resize_map
from manyheads.layers.keymap import Entry, KeyMap, read_weights, rename
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel, run_blocks

__all__ = ["ChannelNorm", "ConvMLP", "MetaFormer", "MetaFormerBlock", "MetaFormerConfig"]

_DIMS = (64, 128, 320, 512)
_SHORT = (2, 2, 6, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaFormerConfig(Config):
    """Sizes of a :class:`MetaFormer`; the defaults are PoolFormer-S12's.

    Attributes:
        depths, embed_dims, mlp_ratios: of each stage.
        mixers: token mixer of each stage, out of :func:`manyheads.attention.grid.list_mixers`;
            one name alone is taken for all stages.
        mixer_options: further options by mixer name.
        num_heads: of each stage, for mixers with heads; None: heads of 32 channels.
        norm: "group" (over channels and places of a map together) or "channel" (over the channels
            of each place).
        positions: stage before which learned positions are added, counted from 0; None: nowhere.
        image_size: rows and columns, or one number for both: of what positions and mixers of fixed
            size are made for. Positions are resized for other images.
        patch, down: kernel, stride and padding of the stem and between stages.
        downsamples: whether a convolution stands before each stage; where widths differ it does.
        in_channels, num_classes: of the images; 0 classes for features alone.
        layer_scale: first value of s1 and s2; None for none.
        drop_path: rate of the last block, the others' rise linearly to it.
        dropout: inside the MLPs.
        head_norm: "official" (norm, then mean) or "timm" (mean, then norm with eps 1e-6).
        stage_norms: a norm of its own for each stage's map and no head: for dense prediction.
        norm_eps: of all other norms.
    """

    depths: tuple[int, ...] = _SHORT
    embed_dims: tuple[int, ...] = _DIMS
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    mixers: str | tuple[str, ...] = "pool"
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_heads: tuple[int, ...] | None = None
    norm: Literal["group", "channel"] = "group"
    positions: int | None = None
    image_size: int | tuple[int, int] = 224
    patch: tuple[int, int, int] = (7, 4, 2)
    down: tuple[int, int, int] = (3, 2, 1)
    downsamples: tuple[bool, ...] | None = None
    in_channels: int = 3
    num_classes: int = 1000
    layer_scale: float | None = 1e-5
    drop_path: float = 0.0
    dropout: float = 0.0
    head_norm: Literal["official", "timm"] = "official"
    stage_norms: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("embed_dims", "mlp_ratios", "num_heads", "downsamples"):
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f"{name} names {len(value)} stages, depths {stages}")
        if not isinstance(self.mixers, str) and len(self.mixers) != stages:
            raise ValueError(
                f"mixers names {len(self.mixers)} stages, depths {stages}: give one a stage, or "
                "one name for all"
            )
        for name, known in (("norm", ("group", "channel")), ("head_norm", ("official", "timm"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {known}")
        if self.positions is not None and not 0 <= self.positions < stages:
            raise ValueError(f"positions before stage {self.positions}: there are {stages} stages")
        for name in self.mixer_options:
            if name not in self.stage_mixers:
                raise ValueError(f"mixer_options names {name!r}, which no stage uses")

    @property
    def stage_mixers(self) -> tuple[str, ...]:
        """The mixer of each stage."""
        if isinstance(self.mixers, str):
            return (self.mixers,) * len(self.depths)
        return self.mixers

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's map for images of ``image_size``."""
        size = self.image_size
        sides = [size, size] if isinstance(size, int) else list(size)
        found = []
        for stage in range(len(self.depths)):
            if stage == 0 or self.has_down(stage):
                kernel, stride, padding = self.patch if stage == 0 else self.down
                sides = [(s + 2 * padding - kernel) // stride + 1 for s in sides]
            found.append((sides[0], sides[1]))
        return tuple(found)

    def has_down(self, stage: int) -> bool:
        """Whether a convolution stands before a stage; the stem stands before the first."""
        if stage == 0:
            return False
        asked = self.downsamples is None or self.downsamples[stage - 1]
        return asked or self.embed_dims[stage] != self.embed_dims[stage - 1]


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.permute(0, 3, 1, 2)


class ConvMLP(nn.Module):
    """Two 1 x 1 convolutions with an exact GELU between, on maps (B, C, H, W)."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(x)))))


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
        x = x + self.drop_path(_scaled(self.token_mixer(self.norm1(x)), self.layer_scale_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale_2))

    @torch.no_grad()
    def fold(self) -> None:
        """Move the layer scales into the weights beside them, in place: for inference alone."""
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


class MetaFormer(VisionModel):
    """A backbone with a token mixer by name in each stage; PoolFormer with pooling.

    Example:
        >>> model = MetaFormer(MetaFormerConfig(mixers=("pool", "pool", "flow", "attention")))
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    config_class: ClassVar[type[Config]] = MetaFormerConfig
    config: MetaFormerConfig
    classifier_names = ("head",)
    first_conv = "stem"

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dims[-1]
        kernel, stride, padding = c.patch
        self.stem = nn.Conv2d(c.in_channels, c.embed_dims[0], kernel, stride, padding)
        self.stages = nn.ModuleList(_stage(c, i) for i in range(len(c.depths)))
        reduction, self.feature_info = stride, []
        for i, dim in enumerate(c.embed_dims):
            reduction *= c.down[1] if c.has_down(i) else 1
            self.feature_info.append(
                {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            )
        if c.stage_norms:
            self.norms = nn.ModuleList(make_norm(c.norm, d, c.norm_eps) for d in c.embed_dims)
            self.norm: nn.Module = nn.Identity()
        else:
            timm = c.head_norm == "timm"
            self.norm = (
                nn.LayerNorm(self.num_features, eps=1e-6)
                if timm
                else make_norm(c.norm, self.num_features, c.norm_eps)
            )
        self.head = self.make_classifier(0 if c.stage_norms else c.num_classes)
        self.apply(_initialise)

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x, self.grad_checkpointing)
            yield x

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.config.head_norm == "official" else x

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        if self.config.stage_norms:
            return self.norms[index](x)
        return super().normalise_map(x, index)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        if self.config.head_norm == "timm":
            pooled = self.norm(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes), or with ``stage_norms`` the normed map of every stage."""
        if self.config.stage_norms:
            return self.forward_intermediates(x, norm=True, intermediates_only=True)
        return super().forward(x)

    def no_weight_decay(self) -> set[str]:
        return {n for n, _ in self.named_parameters() if n.endswith("position")}

    def fuse(self) -> Self:
        """Return a copy for inference with layer scales folded away; equal up to rounding."""
        fused = copy.deepcopy(self).eval()
        for module in fused.modules():
            if isinstance(module, MetaFormerBlock):
                module.fold()
        return fused.requires_grad_(False)

    def load_official(self, source: Any) -> Self:
        """Load an official checkpoint, or one under timm's names; strictly.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = read_weights(source)
        if "stem.conv.weight" in weights:
            ours = self._timm_map().to_ours(weights, dict(self.state_dict(keep_vars=True)))
            self.load_state_dict(ours, assign=any(t.is_meta for t in ours.values()))
            return self
        return super().load_official(weights)

    def key_map(self) -> KeyMap:
        """Names of sail-sg/poolformer: stages, convolutions and positions count in one list."""
        c = self.config
        entries = _both("stem", "patch_embed.proj")
        place = 0
        for i in range(len(c.depths)):
            if c.has_down(i):
                entries += _both(f"stages.{i}.downsample", f"network.{place}.proj")
                place += 1
            if c.positions == i:
                entries.append(rename(f"stages.{i}.position", f"network.{place}.pos_embed"))
                place += 1
            entries += _block_entries(f"stages.{i}.blocks.{{}}.", f"network.{place}.{{}}.")
            if c.stage_norms:
                entries += _both(f"norms.{i}", f"norm{place}")
            place += 1
        return KeyMap(*entries, *_both("norm", "norm"), *_both("head", "head"))

    def _timm_map(self) -> KeyMap:
        entries = _both("stem", "stem.conv")
        for i in range(len(self.config.depths)):
            entries += _both(f"stages.{i}.downsample", f"stages.{i}.downsample.conv")
            entries += _block_entries(f"stages.{i}.blocks.{{}}.", f"stages.{i}.blocks.{{}}.", True)
        return KeyMap(*entries, *_both("norm", "head.norm"), *_both("head", "head.fc"))


def _both(ours: str, official: str) -> list[Entry]:
    return [rename(f"{ours}.{part}", f"{official}.{part}") for part in ("weight", "bias")]


def _block_entries(ours: str, official: str, timm: bool = False) -> list[Entry]:
    entries: list[Entry] = []
    for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2", "token_mixer.proj"):
        entries += _both(ours + name, official + name)
    entries += _both(ours + "token_mixer.qkv", official + "token_mixer.qkv")
    entries.append(rename(ours + "token_mixer.fc.weight", official + "token_mixer.fc.weight"))
    for i in (1, 2):
        name = f"layer_scale{i}.scale" if timm else f"layer_scale_{i}"
        entries.append(rename(f"{ours}layer_scale_{i}", official + name))
    return entries


def _stage(c: MetaFormerConfig, index: int) -> Stage:
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


def _initialise(module: nn.Module) -> None:
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


def _config(depths: tuple[int, ...], wide: bool = False, **changes: Any) -> MetaFormerConfig:
    dims = (96, 192, 384, 768) if wide else _DIMS
    return MetaFormerConfig(depths=depths, embed_dims=dims, **changes)


def _mixed(mixers: str, **changes: Any) -> MetaFormerConfig:
    names = {"p": "pool", "a": "attention", "f": "spatial_fc", "i": "identity"}
    return _config(_SHORT, mixers=tuple(names[m] for m in mixers), **changes)


_TABLE: Mapping[str, tuple[MetaFormerConfig, tuple[str, ...]]] = {
    "poolformer_s12": (_config(_SHORT, drop_path=0.1), ("metaformer_s12", "poolformer")),
    "poolformer_s24": (_config((4, 4, 12, 4), drop_path=0.1), ()),
    "poolformer_s36": (_config((6, 6, 18, 6), drop_path=0.2, layer_scale=1e-6), ()),
    "poolformer_m36": (_config((6, 6, 18, 6), True, drop_path=0.3, layer_scale=1e-6), ()),
    "poolformer_m48": (_config((8, 8, 24, 8), True, drop_path=0.4, layer_scale=1e-6), ()),
    "metaformer_id_s12": (_mixed("iiii", drop_path=0.1), ()),
    "metaformer_pppf_s12_224": (_mixed("pppf", drop_path=0.1), ()),
    "metaformer_ppff_s12_224": (_mixed("ppff", drop_path=0.1), ()),
    "metaformer_pppa_s12_224": (_mixed("pppa", norm="channel", positions=3, drop_path=0.1), ()),
    "metaformer_ppaa_s12_224": (_mixed("ppaa", norm="channel", positions=2, drop_path=0.1), ()),
}
register_variants(MetaFormer, "metaformer", _TABLE)
