"""Flowformer for images: four stages of bidirectional flow attention (2202.06258).

B batch, H and W rows and columns of patches, N = H · W, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.flow import FlowAttention, FlowConfig
from manyheads.config import Config
from manyheads.errors import nearest
from manyheads.layers.drop_path import DropPath
from manyheads.layers.grid import resize_positions
from manyheads.layers.keymap import KeyMap, convert, rename, split
from manyheads.layers.mlp import MLP
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel, run_blocks

__all__ = ["FlowformerVision", "FlowformerVisionConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowformerVisionConfig(Config):
    """Sizes of the model; the defaults are the published ImageNet-1K model's.

    Attributes:
        image_size: side of the images that the learned positions are made for; others are
            interpolated.
        patch_size: side of a patch.
        in_channels, num_classes: of the image; 0 classes for features alone.
        embed_dims, depths, mlp_ratios: of each stage.
        num_heads: in every block of every stage.
        clamp, outer_eps: see :func:`manyheads.attention.flow`.
        layer_scale: initial factor on the MLP branches.
        dropout: inside the MLPs while training.
        drop_path: rate of stochastic depth of the last block; the others' rise linearly to it.
        norm_eps: of the LayerNorms.
    """

    image_size: int = 224
    patch_size: int = 4
    in_channels: int = 3
    num_classes: int = 1000
    embed_dims: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (3, 3, 10, 3)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    num_heads: int = 12
    clamp: float | None = 1.0
    outer_eps: float = 1e-6
    layer_scale: float = 1e-5
    dropout: float = 0.0
    drop_path: float = 0.2
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.mlp_ratios):
            raise ValueError(
                f"embed_dims, depths and mlp_ratios name {len(self.embed_dims)}, "
                f"{len(self.depths)} and {len(self.mlp_ratios)} stages: give one entry a stage"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches on a side of the image that the positions are made for."""
        return self.image_size // self.patch_size

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> FlowformerVisionConfig:
        """Read the arguments of the official class, with its own defaults for what is missing.

        Raises:
            ValueError: an unknown key; the nearest is named.
        """
        values: dict[str, Any] = {
            "embed_dims": (64, 128, 256, 512), "depths": (2, 2, 10, 4), "drop_path": 0.0
        }  # fmt: skip
        for key, value in official.items():
            if key not in _OFFICIAL:
                known = nearest(key, _OFFICIAL)
                raise ValueError(f"unknown key {key!r} in an official config{known}")
            values[_OFFICIAL[key]] = value
        return cls.from_dict(values)


_OFFICIAL = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_channels",
    "num_classes": "num_classes",
    "embed_dim": "embed_dims",
    "depth": "depths",
    "mlp_ratio": "mlp_ratios",
    "init_values": "layer_scale",
    "drop_rate": "dropout",
    "drop_path_rate": "drop_path",
}


class _Block(nn.Module):
    """x += flow(norm(x)); x += gamma · mlp(norm(x)): the layer scale is on the MLP alone."""

    def __init__(self, config: FlowformerVisionConfig, stage: int, drop_path: float) -> None:
        super().__init__()
        c, dim = config, config.embed_dims[stage]
        self.mixer_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mixer = FlowAttention(
            FlowConfig(
                embed_dim=dim, num_heads=c.num_heads, is_causal=False, clamp=c.clamp,
                outer_eps=c.outer_eps,
            )
        )  # fmt: skip
        self.mlp_norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = MLP(dim, int(dim * c.mlp_ratios[stage]), dropout=c.dropout)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((dim,), float(c.layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.mixer_norm(x)))
        y = self.mlp(self.mlp_norm(x))
        return x + self.drop_path(y if self.gamma is None else self.gamma * y)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the layer scale into the MLP's last layer, in place: for inference alone."""
        if self.gamma is not None:
            self.mlp.fc2.weight.mul_(self.gamma[:, None])
            self.mlp.fc2.bias.mul_(self.gamma)
            self.gamma = None


class FlowformerVision(VisionModel):
    """Hierarchical vision backbone with attention over the whole image at every stage.

    Linear in the number of patches. Any image size runs: learned positions are interpolated, and
    sides that do not divide are padded with zeros on the right and below. The surface is timm's.

    Example:
        >>> model = FlowformerVision(FlowformerVisionConfig(depths=(1, 1, 1, 1))).eval()
        >>> model(torch.randn(1, 3, 224, 160)).shape
        torch.Size([1, 1000])
    """

    config_class: ClassVar[type[Config]] = FlowformerVisionConfig
    config: FlowformerVisionConfig
    first_conv = "embeds.0"

    def __init__(self, config: FlowformerVisionConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes = c.num_classes
        self.num_features = c.embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": c.patch_size * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(c.embed_dims)
        ]
        widths = (c.in_channels, *c.embed_dims)
        self.embeds = nn.ModuleList(
            nn.Conv2d(widths[i], dim, side, side)
            for i, dim in enumerate(c.embed_dims)
            for side in [c.patch_size if i == 0 else 2]
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2, c.embed_dims[0]))
        total, number = sum(c.depths), 0
        stages = []
        for i, depth in enumerate(c.depths):
            rates = [c.drop_path * (number + j) / max(total - 1, 1) for j in range(depth)]
            stages.append(nn.ModuleList(_Block(c, i, rate) for rate in rates))
            number += depth
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features, eps=c.norm_eps)
        self.head = self.make_classifier(c.num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init)

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        for i in range(len(self.stages)):
            x = self._stage(x, i)
            yield x

    def as_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def finish(self, x: Tensor) -> Tensor:
        """Return the normalised features of the last stage, (B, H, W, C)."""
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features (B, H, W, C) by their mean and classify; ``pre_logits``: pool alone."""
        pooled = x.mean((1, 2))
        return pooled if pre_logits else self.head(pooled)

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        if index < len(self.stages) - 1:
            return x
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^(?:embeds\.0|pos_embed)"
        if coarse:
            return {"stem": stem, "blocks": r"^(?:stages|embeds)\.(\d+)"}
        blocks = [
            (r"^embeds\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^(?:norm|head)", (99999,)),
        ]
        return {"stem": stem, "blocks": blocks}

    def fuse(self) -> Self:
        """Return a copy for inference with layer scales folded away; equal up to rounding."""
        fused = copy.deepcopy(self).eval()
        for module in fused.modules():
            if isinstance(module, _Block):
                module.fold()
        return fused.requires_grad_(False)

    def _stage(self, x: Tensor, index: int) -> Tensor:
        """Take the image or (B, H, W, C) of the stage before to (B, H, W, C) of this one."""
        embed = cast(nn.Conv2d, self.embeds[index])
        if index:
            x = x.permute(0, 3, 1, 2)
        below, right = (-size % side for size, side in zip(x.shape[2:], embed.stride, strict=True))
        if below or right:
            x = F.pad(x, (0, right, 0, below))
        x = embed(x)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT
        if index == 0:
            x = x + resize_positions(self.pos_embed, (rows, columns))
        x = run_blocks(self.stages[index], x, checkpointing=self.grad_checkpointing)
        return x.unflatten(1, (rows, columns))

    def key_map(self) -> KeyMap:
        """Names of the official code; positions of another image size are interpolated."""
        ours, theirs = "stages.{}.{}.", "blocks.{}.{}."
        side = self.config.grid
        pairs = [
            ("mixer_norm", "norm1"),
            ("mixer.out_proj", "attn.proj"),
            ("mlp_norm", "norm2"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ]
        kinds = ("weight", "bias")
        return KeyMap(
            convert(
                "pos_embed", "pos_embed", lambda t: resize_positions(t, (side, side)), lambda t: t
            ),
            *(rename(f"embeds.{{}}.{k}", f"patch_embed.{{}}.proj.{k}") for k in kinds),
            *(rename(f"{ours}{a}.{k}", f"{theirs}{b}.{k}") for a, b in pairs for k in kinds),
            *(
                split([f"{ours}mixer.{n}_proj.{k}" for n in "qkv"], f"{theirs}attn.qkv.{k}")
                for k in kinds
            ),
            rename(f"{ours}gamma", f"{theirs}gamma"),
            *(rename(f"{name}.{k}", f"{name}.{k}") for name in ("norm", "head") for k in kinds),
        )


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


register_variants(
    FlowformerVision,
    "flowformer",
    {"flowformer_vision_96": (FlowformerVisionConfig(), ("vision_96_19layers",))},
)
