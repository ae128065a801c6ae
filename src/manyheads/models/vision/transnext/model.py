"""TransNeXt: a four-stage backbone with aggregated attention and gated MLPs (2311.17132).

x += attention(norm(x)); x += ConvGLU(norm(x)), a strided convolution before and a norm behind
every stage. Shi, "TransNeXt: Robust Foveal Visual Perception for Vision Transformers".
B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from operator import index
from typing import Any, ClassVar, Self, cast

from torch import Tensor, nn

from manyheads.attention.aggregated import AggregatedAttention, LengthScaledAttention
from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, rename
from manyheads.layers.packed import channels_last_weights
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel
from manyheads.models.vision.transnext.blocks import ConvGLU, Stage, build_stage, initialise
from manyheads.models.vision.transnext.config import TABLE, TransNeXtConfig

__all__ = ["TransNeXt"]


class TransNeXt(VisionModel):
    """TransNeXt: logits of images, or the normed map of every stage (``features_only=True``).

    ``forward_features`` returns the last map, normed and not pooled; ``forward_head`` with
    ``pre_logits=True`` pools it.

    Example:
        >>> model = TransNeXt(TransNeXtConfig(depths=(1, 1, 1, 1), num_classes=5))
        >>> model(torch.randn(1, 3, 96, 138)).shape
        torch.Size([1, 5])
    """

    config_class: ClassVar[type[Config]] = TransNeXtConfig
    config: TransNeXtConfig
    first_conv = "stages.0.patch_embed.proj"
    crop_pct = 0.875

    def __init__(self, config: TransNeXtConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dims[-1]
        self.stages = nn.ModuleList(build_stage(c, i) for i in range(len(c.depths)))
        self.feature_info = [
            {"num_chs": dim, "reduction": c.patch_size * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(c.embed_dims)
        ]
        self.head = self.make_classifier(c.num_classes)
        self.apply(initialise)

    def iter_stages(self, x: Tensor) -> Iterator[Tensor]:
        for side in x.shape[2:]:
            index(side)  # a tracer takes the size as fixed from here on, as attention does
        for stage in self.stages:
            x = stage(x, self.grad_checkpointing)
            yield x

    def finish(self, x: Tensor) -> Tensor:
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def set_input_size(self, image_size: int | tuple[int, int]) -> None:
        """Make position biases for images of this size from now on, computed and not resized.

        ``pretrain_size`` stays what it was, so that coordinates keep their meaning.
        """
        self.config = c = self.config.replace(
            image_size=image_size, pretrain_size=self.config.start
        )
        for i, stage in enumerate(self.stages):
            for block in cast(Stage, stage).blocks:
                cast(AggregatedAttention, block.attn).grid = c.grid(i)

    def no_weight_decay(self) -> set[str]:
        words = self.no_weight_decay_keywords()
        return {n for n, _ in self.named_parameters() if any(w in n for w in words)}

    def no_weight_decay_keywords(self) -> set[str]:
        """Return parts of names of parameters that weight decay should leave alone."""
        return {"query_embedding", "relative_pos_bias_local", "cpb", "temperature"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": r"^stages\.0\.patch_embed",
            "blocks": [
                (r"^stages\.(\d+)\.patch_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99998,)),
                (r"^head", (99999,)),
            ],
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """As of every backbone; from 384 pixels on images are squeezed to the size, not cropped."""
        cfg = super().pretrained_cfg
        if min(self.config.sides) >= 384:
            cfg |= {"crop_pct": 1.0, "crop_mode": "squash"}
        return cfg

    default_cfg = pretrained_cfg

    def fuse(self) -> Self:
        """Return a copy for inference that keeps position biases of sizes it has seen, and has
        packed weights with GELU, product and sum inside."""
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        for module in list(fused.modules()):
            if isinstance(module, AggregatedAttention | LengthScaledAttention):
                module.freeze()
            elif isinstance(module, ConvGLU):
                module.pack()
        channels_last_weights(fused)
        return fused

    def key_map(self) -> KeyMap:
        """Names of DaiShiResearch/TransNeXt: stages counted from 1 in names of their own."""
        entries: list[Entry] = []
        for i in range(len(self.config.depths)):
            ours, block = f"stages.{i}.", f"block{i + 1}.{{}}."
            for name in ("proj", "norm"):
                entries += _both(f"{ours}patch_embed.{name}", f"patch_embed{i + 1}.{name}")
            entries += _both(f"{ours}norm", f"norm{i + 1}")
            for name in _LAYERS:
                entries += _both(f"{ours}blocks.{{}}.{name}", f"{block}{name}")
            entries += _both(f"{ours}blocks.{{}}.mlp.dwconv", f"{block}mlp.dwconv.dwconv")
            for name in _PARAMETERS:
                entries.append(rename(f"{ours}blocks.{{}}.attn.{name}", f"{block}attn.{name}"))
        return KeyMap(*entries, *_both("head", "head"))


_LAYERS = (
    *("norm1", "norm2", "mlp.fc1", "mlp.fc2"),
    *(f"attn.{name}" for name in ("q", "kv", "qkv", "proj", "sr", "norm", "cpb_fc1", "cpb_fc2")),
)
_PARAMETERS = (
    "temperature",
    "query_embedding",
    "relative_pos_bias_local",
    "learnable_tokens",
    "learnable_bias",
)


def _both(ours: str, official: str) -> list[Entry]:
    return [rename(f"{ours}.{part}", f"{official}.{part}") for part in ("weight", "bias")]


register_variants(TransNeXt, "transnext", TABLE)
