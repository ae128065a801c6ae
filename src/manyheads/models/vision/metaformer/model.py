"""MetaFormer and PoolFormer: a four-stage backbone whose token mixer is a slot (2111.11418).

B batch, C channels, H and W rows and columns.

x += s1 · mixer(norm(x)); x += s2 · mlp(norm(x)) on maps (B, C, H, W), a strided convolution before
every stage. Yu et al., "MetaFormer Is Actually What You Need for Vision". Official numerics: the
last norm is taken over the map and then averaged; ``head_norm="timm"`` averages first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, read_weights, rename
from manyheads.layers.packed import channels_last_weights
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel
from manyheads.models.vision.metaformer.blocks import (
    MetaFormerBlock,
    build_stage,
    initialise,
    make_norm,
)
from manyheads.models.vision.metaformer.config import TABLE, MetaFormerConfig

__all__ = ["MetaFormer"]


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
    fused = False

    def __init__(self, config: MetaFormerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dims[-1]
        kernel, stride, padding = c.patch
        self.stem = nn.Conv2d(c.in_channels, c.embed_dims[0], kernel, stride, padding)
        self.stages = nn.ModuleList(build_stage(c, i) for i in range(len(c.depths)))
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
        self.apply(initialise)

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        if self.fused:
            x = x.contiguous(memory_format=torch.channels_last)
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
        """Return a copy for inference, equal up to rounding: channels stand last in memory, layer
        scales are folded away, MLPs have packed weights and their GELU and sum inside."""
        fused = copy.deepcopy(self).eval()
        for module in fused.modules():
            if isinstance(module, MetaFormerBlock):
                module.fold()
        channels_last_weights(fused)
        fused.fused = True
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


register_variants(MetaFormer, "metaformer", TABLE)
