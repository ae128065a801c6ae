"""IA-RED² on clips: TimeSformer with interpreters that judge patches of space and time.

B batch, C channels, T frames, H and W rows and columns, S places of a frame, N = 1 + S · T tokens.

With joint attention dropped patches are gathered away, as in images. Divided attention needs the
whole grid, so there they are masked on either axis and no time is saved. A reconstruction: the
paper's code for clips was never released. Pan et al., 2106.12620; Bertasius et al., 2102.05095.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.keymap import KeyMap, read_weights, rename
from manyheads.models.base import Model, register_variants
from manyheads.models.vision.ia_red2.blocks import Block, DividedBlock, PatchEmbed
from manyheads.models.vision.ia_red2.config import IARed2Config
from manyheads.models.vision.ia_red2.dropping import Dropping
from manyheads.models.vision.ia_red2.model import PARTS, resize_tokens

__all__ = ["IARed2Video", "IARed2VideoConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IARed2VideoConfig(IARed2Config):
    """Sizes of an :class:`IARed2Video`; the defaults are TimeSformer-B's.

    Attributes:
        frames: T of every clip.
        attention: "divided" (along time, then within frames) or "joint" (among all tokens).
        embed_dim, num_heads, num_classes: as in images, with TimeSformer's defaults.
    """

    embed_dim: int = 768
    num_heads: int = 12
    num_classes: int = 400
    frames: int = 8
    attention: Literal["divided", "joint"] = "divided"

    def __post_init__(self) -> None:
        IARed2Config.__post_init__(self)
        if self.frames < 1:
            raise ValueError(f"frames {self.frames} must be 1 or more")
        if self.attention not in ("divided", "joint"):
            raise ValueError(f"attention {self.attention!r} must be 'divided' or 'joint'")


class IARed2Video(Dropping, Model):
    """TimeSformer with interpreters; lossy as soon as they drop patches, and they need training.

    Example:
        >>> sizes = {"groups": (1, 1), "embed_dim": 48, "image_size": 32, "num_classes": 5}
        >>> model = IARed2Video(IARed2VideoConfig(**sizes, frames=3, attention="joint"))
        >>> clips = torch.randn(2, 3, 3, 32, 48)
        >>> model(clips).shape, model.heat_map(clips).shape
        (torch.Size([2, 5]), torch.Size([2, 3, 2, 3]))
    """

    config_class: ClassVar[type[Config]] = IARed2VideoConfig
    config: IARed2VideoConfig

    def __init__(self, config: IARed2VideoConfig) -> None:
        super().__init__()
        self.config = c = config
        self.depths, self.threshold, self.gathers = c.groups, c.threshold, c.attention == "joint"
        self.patch_embed = PatchEmbed(c.in_channels, c.embed_dim, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + c.grid[0] * c.grid[1], c.embed_dim))
        self.time_embed = nn.Parameter(torch.zeros(1, c.frames, c.embed_dim))
        self.position_dropout = nn.Dropout(c.dropout)
        total = sum(c.groups)
        blocks: list[nn.Module] = []
        for i in range(total):
            options = {
                "mlp_ratio": c.mlp_ratio,
                "qkv_bias": c.qkv_bias,
                "dropout": c.dropout,
                "drop_path": c.drop_path * i / max(total - 1, 1),
                "norm_eps": c.norm_eps,
            }
            if self.gathers:
                blocks.append(Block(c.embed_dim, c.num_heads, **options))  # type: ignore[arg-type]
            else:
                blocks.append(DividedBlock(c.embed_dim, c.num_heads, frames=c.frames, **options))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head = nn.Linear(c.embed_dim, c.num_classes) if c.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("cls_token", "pos_embed"):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        # As in the official code: blocks behind the first begin without time.
        for block in blocks[1:]:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_fc.weight)
        self.make_interpreters(c.embed_dim, c.interpreter_heads, c.first_score)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        c = self.config
        if x.ndim != 5 or x.shape[1] != c.in_channels or x.shape[2] != c.frames:
            raise ValueError(
                f"clips have shape {tuple(x.shape)}, expected (batch, channels, frames, height, "
                f"width) with {c.in_channels} channels and {c.frames} frames"
            )
        cells = self.patch_embed(x.transpose(1, 2).flatten(0, 1))
        grid = (cells.shape[2], cells.shape[3])
        positions = resize_tokens(self.pos_embed, c.grid, grid).to(cells)
        places = cells.flatten(2).mT + positions[:, 1:]  # (B · T, S, C)
        places = places.unflatten(0, (x.shape[0], c.frames)).transpose(1, 2)  # (B, S, T, C)
        places = places + self.time_embed.to(cells)
        cls = (self.cls_token.to(cells) + positions[:, :1]).expand(x.shape[0], -1, -1)
        return self.position_dropout(torch.cat((cls, places.flatten(1, 2)), 1)), (*grid, c.frames)

    def all_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def read_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(x[:, 0])
        return features, self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of clips (B, C, T, H, W)."""
        embedded, _ = self.embed(x)
        for tokens, _ in self.run_groups(embedded, self.greedy):
            last = tokens
        return self.read_out(last.x)[1]

    def heat_map(self, x: Tensor, *, group: int | None = None) -> Tensor:
        """Return scores as pictures in [0, 1], (B, T, rows, columns); see :class:`Dropping`."""
        return super().heat_map(x, group=group).movedim(3, 1)

    def key_map(self) -> KeyMap:
        """TimeSformer's official names, and those of IA-RED²'s interpreters beside them."""
        entries = [rename(n, f"model.{n}") for n in ("cls_token", "pos_embed", "time_embed")]
        parts = [*PARTS]
        if not self.gathers:
            parts += ["temporal_norm1", "temporal_attn.qkv", "temporal_attn.proj", "temporal_fc"]
        for name in ("patch_embed.proj", "norm", "head", *(f"blocks.{{}}.{p}" for p in parts)):
            entries += [rename(f"{name}.{w}", f"model.{name}.{w}") for w in ("weight", "bias")]
        entries += [
            rename(f"interpreters.{{}}.qk.{w}", f"groups.{{}}.agent.qk.{w}")
            for w in ("weight", "bias")
        ]
        return KeyMap(*entries)

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load TimeSformer's layout, strictly, with or without interpreters; returns self.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = dict(read_weights(source))
        if not any(k.startswith("groups.") for k in weights):
            warnings.warn(
                "the checkpoint has no interpreters: those of the model stay as they are and have "
                "to be trained",
                stacklevel=2,
            )
            weights |= {k: t for k, t in self.to_official().items() if k.startswith("groups.")}
        return super().load_official(weights)


register_variants(
    IARed2Video,
    "ia-red2",
    {
        "ia_red2_timesformer_base": (IARed2VideoConfig(), ()),
        "ia_red2_timesformer_base_joint": (IARed2VideoConfig(attention="joint"), ()),
    },
)
