"""The reconstruction of DualToken-ViT as a backbone.

B batch, C channels, H and W rows and columns, N = H · W, G side of the grid of global tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from manyheads.attention.dual_token import halvings
from manyheads.config import Config
from manyheads.layers.keymap import KeyMap
from manyheads.models.vision.base import VisionModel, run_blocks
from manyheads.models.vision.dualtoken.blocks import ConvStem, DualTokenBlock, Merge

__all__ = ["DualTokenConfig", "DualTokenViT"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DualTokenConfig(Config):
    """Sizes of a :class:`DualTokenViT`; the defaults are the reconstruction of DualToken-ViT-S.

    Attributes:
        embed_dims, depths, num_heads, mlp_ratios: of each stage.
        grid: G; tokens are G x G at every image size.
        alpha: weight of the old global tokens in a block.
        mix: the global tokens' MLP mixes tokens instead of channels: cheaper, 0.1% less accurate
            in the paper.
        neck_dim: channels that the classifier reads.
        image_size: rows and columns, or one number for both, that the numbers of halvings are
            made for; other images run, and adaptive pooling makes up for the rest.
        in_channels, num_classes: of the images; 0 classes for features alone.
        drop_path: rate of the last block, the others' rise linearly to it.
    """

    embed_dims: tuple[int, ...] = (64, 128, 256)
    depths: tuple[int, ...] = (2, 6, 4)
    num_heads: tuple[int, ...] = (2, 4, 8)
    mlp_ratios: tuple[float, ...] = (4, 4, 4)
    grid: int = 7
    alpha: float = 0.5
    mix: bool = True
    neck_dim: int = 1280
    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    num_classes: int = 1000
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for name in ("depths", "num_heads", "mlp_ratios"):
            count = len(getattr(self, name))
            if count != len(self.embed_dims):
                raise ValueError(f"{name} names {count} stages, embed_dims {len(self.embed_dims)}")
        if self.embed_dims[0] % 2:
            raise ValueError(f"embed_dims[0] {self.embed_dims[0]} must be even: the stem halves it")

    @property
    def steps(self) -> tuple[int, ...]:
        """Halvings of each stage's map on its way to the grid, for images of ``image_size``."""
        size = self.image_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        strides = (8 << i for i in range(len(self.depths)))
        return tuple(halvings((-(-rows // s), -(-columns // s)), self.grid) for s in strides)


class DualTokenViT(VisionModel):
    """Light backbone with travelling global tokens: a reconstruction, linear in the places.

    ``forward_features`` returns normed tokens (B, G² + N, C), the global ones first. No official
    weights exist, and no accuracy of the paper is claimed.

    Example:
        >>> model = DualTokenViT(DualTokenConfig(depths=(1, 1, 1)))
        >>> model(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    config_class: ClassVar[type[Config]] = DualTokenConfig
    config: DualTokenConfig
    first_conv = "patch_embed.stem.0"

    def __init__(self, config: DualTokenConfig) -> None:
        super().__init__()
        self.config = c = config
        dims = c.embed_dims
        self.num_classes, self.num_features = c.num_classes, dims[-1]
        self.patch_embed = ConvStem(c.in_channels, dims[0])
        self.global_token = nn.Parameter(torch.zeros(1, c.grid**2, dims[0]))
        self.stages = nn.ModuleList(_stage(c, i) for i in range(len(dims)))
        self.merge = nn.ModuleList(Merge(a, b) for a, b in pairwise(dims))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.neck = nn.ModuleList((nn.Linear(dims[-1], c.neck_dim), nn.LayerNorm(c.neck_dim)))
        self.head = self.make_classifier(c.num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": 8 << i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.apply(_initialise)
        nn.init.trunc_normal_(self.global_token, std=0.02)

    @property
    def head_hidden_size(self) -> int:
        return self.config.neck_dim

    def iter_stages(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.patch_embed(x)
        g = self.global_token.to(x).expand(x.shape[0], -1, -1)
        for i, stage in enumerate(self.stages):
            if i:
                x, g = self.merge[i - 1](x, g)
            x, g = run_blocks(stage, (x, g), checkpointing=self.grad_checkpointing)
            yield x, g

    def as_map(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0].permute(0, 3, 1, 2)

    def finish(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return self.norm(torch.cat((x[1], x[0].flatten(1, 2)), 1))

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        if index < len(self.stages) - 1:
            return x
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        linear, norm = self.neck
        pooled = F.gelu(norm(linear(x))).mean(1)
        return pooled if pre_logits else self.head(pooled)

    def no_weight_decay(self) -> set[str]:
        return {"global_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks: Any = r"^stages\.(\d+)"
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.(\d+)", None), (r"^(?:norm|neck|head)", (99999,))]
        return {"stem": r"^(?:patch_embed|global_token)", "blocks": blocks}

    def fuse(self) -> Self:
        """Return a copy for inference, the stem's norms folded away; equal up to rounding."""
        fused = copy.deepcopy(self).eval()
        stem = fused.patch_embed.stem
        for i in range(0, len(stem), 3):
            conv, norm = stem[i], stem[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                stem[i], stem[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
        return fused.requires_grad_(False)

    def key_map(self) -> KeyMap:
        """Neither code nor weights were published."""
        raise ValueError(
            "DualTokenViT is a reconstruction without official checkpoints: use save() and load()"
        )


def _stage(c: DualTokenConfig, index: int) -> nn.ModuleList:
    total, before = sum(c.depths), sum(c.depths[:index])
    return nn.ModuleList(
        DualTokenBlock(
            c.embed_dims[index],
            c.num_heads[index],
            mlp_ratio=c.mlp_ratios[index],
            drop_path=c.drop_path * (before + j) / max(total - 1, 1),
            grid=c.grid,
            steps=c.steps[index],
            alpha=c.alpha,
            mix=c.mix,
        )
        for j in range(c.depths[index])
    )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if cast(Tensor | None, module.bias) is not None:
            nn.init.zeros_(module.bias)
