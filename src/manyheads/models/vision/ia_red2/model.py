"""IA-RED²: a vision transformer that drops the patches that tell it nothing (2106.12620).

B batch, N tokens (the class token first), C channels, H and W rows and columns.

Pan et al., "IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers". An
interpreter in front of every group of blocks scores the tokens that are left; those at or below
the threshold are gone for good. They are gathered away, so that the time falls with them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.grid import resize_map
from manyheads.layers.keymap import Entry, KeyMap, read_weights, rename, tied
from manyheads.layers.packed import pack_linears
from manyheads.models.base import register_variants
from manyheads.models.vision.base import VisionModel
from manyheads.models.vision.ia_red2.blocks import Block, PatchEmbed
from manyheads.models.vision.ia_red2.config import VARIANTS, IARed2Config
from manyheads.models.vision.ia_red2.dropping import Dropping
from manyheads.models.vision.ia_red2.tokens import Tokens, scatter

__all__ = ["PARTS", "IARed2", "resize_tokens"]


class _Stage(NamedTuple):
    tokens: Tokens
    grid: tuple[int, int]


class IARed2(Dropping, VisionModel):
    """DeiT with interpreters; lossy as soon as they drop tokens, and they need training.

    ``forward`` returns logits (B, classes); :meth:`look` also returns what was looked at. Maps of
    stages have zeros where tokens are gone. While a graph is traced (compile, export) tokens are
    masked instead of gathered: the same answers without the gain.

    Example:
        >>> config = IARed2Config(groups=(1, 2), embed_dim=48, image_size=64, num_classes=10)
        >>> model = IARed2(config)
        >>> model(torch.randn(2, 3, 64, 96)).shape
        torch.Size([2, 10])
        >>> model.look(torch.randn(2, 3, 64, 64)).policies[1].shape
        torch.Size([2, 17])
    """

    config_class: ClassVar[type[Config]] = IARed2Config
    config: IARed2Config
    first_conv = "patch_embed.proj"

    def __init__(self, config: IARed2Config) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dim
        self.depths, self.threshold = c.groups, c.threshold
        self.patch_embed = PatchEmbed(c.in_channels, c.embed_dim, c.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + c.grid[0] * c.grid[1], c.embed_dim))
        self.position_dropout = nn.Dropout(c.dropout)
        total = sum(c.groups)
        self.blocks = nn.ModuleList(
            Block(
                c.embed_dim,
                c.num_heads,
                mlp_ratio=c.mlp_ratio,
                qkv_bias=c.qkv_bias,
                dropout=c.dropout,
                drop_path=c.drop_path * i / max(total - 1, 1),
                norm_eps=c.norm_eps,
            )
            for i in range(total)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.head = self.make_classifier(c.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in self.no_weight_decay():
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        self.make_interpreters(c.embed_dim, c.interpreter_heads, c.first_score)
        ends = [sum(c.groups[: i + 1]) - 1 for i in range(len(c.groups))]
        self.feature_info = [
            {"num_chs": c.embed_dim, "reduction": c.patch_size, "module": f"blocks.{end}"}
            for end in ends
        ]

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        cells = self.patch_embed(x)
        grid = (cells.shape[2], cells.shape[3])
        positions = resize_tokens(self.pos_embed, self.config.grid, grid).to(cells)
        cls = self.cls_token.expand(x.shape[0], -1, -1).to(cells)
        tokens = torch.cat((cls, cells.flatten(2).mT), 1) + positions
        return self.position_dropout(tokens), grid

    def all_blocks(self) -> list[nn.Module]:
        return list(self.blocks)

    def read_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        normed = self.norm(x[:, :1])
        return normed[:, 0], self.forward_head(normed)

    def iter_stages(self, x: Tensor) -> Iterator[_Stage]:
        embedded, (rows, columns) = self.embed(x)
        checkpointing = self.grad_checkpointing
        for tokens, _ in self.run_groups(embedded, self.greedy, checkpointing=checkpointing):
            yield _Stage(tokens, (rows, columns))

    def as_map(self, x: _Stage) -> Tensor:
        return scatter(x.tokens.x, x.tokens)[:, 1:].mT.unflatten(2, x.grid)

    def finish(self, x: _Stage) -> Tensor:
        """Return normed tokens (B, N, C), the class token first, 0 where they are gone."""
        return scatter(self.norm(x.tokens.x), x.tokens)

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        """Every group's map is normed; where tokens are gone it stays 0."""
        gone = (x == 0).all(1, keepdim=True)
        return torch.where(gone, 0, self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.dropout(x[:, 0])
        return pooled if pre_logits else self.head(pooled)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stem = r"^cls_token|pos_embed|patch_embed"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def fuse(self) -> Self:
        """Return a copy for inference with packed weights; equal up to rounding."""
        fused = copy.deepcopy(self).eval()
        pack_linears(fused.blocks)
        return fused.requires_grad_(False)

    def key_map(self) -> KeyMap:
        """Names of the released model: timm's, and every block a second time in its group."""
        entries = [rename(n, n) for n in ("cls_token", "pos_embed")]
        for name in ("patch_embed.proj", "norm", "head", *(f"blocks.{{}}.{p}" for p in PARTS)):
            entries += [rename(f"{name}.{w}", f"{name}.{w}") for w in ("weight", "bias")]
        first = 0
        for g, depth in enumerate(self.depths):
            entries += [
                rename(f"interpreters.{g}.qk.{w}", f"groups.{g}.agent.qk.{w}")
                for w in ("weight", "bias")
            ]
            entries += _twins(g, first, depth)
            first += depth
        return KeyMap(*entries)

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load the released layout, strictly, or a plain DeiT of timm's names; returns self.

        Blocks may stand under ``blocks``, under ``groups``, or under both. A plain DeiT has no
        interpreters: the model keeps its own, with a warning. Positions are resized to
        ``image_size``.

        Raises:
            ValueError: keys are missing, left over or of another shape.
        """
        weights = dict(read_weights(source))
        own = {k: t for k, t in self.to_official().items() if k.startswith("groups.")}
        if not any(k.startswith("groups.") for k in weights):
            warnings.warn(
                "the checkpoint has no interpreters: those of the model stay as they are and have "
                "to be trained",
                stacklevel=2,
            )
            weights |= {k: t for k, t in own.items() if ".agent." in k}
        for theirs, twin in self._places():
            for name in [k for k in own if k.startswith(theirs)]:
                other = twin + name.removeprefix(theirs)
                if name in weights:
                    weights.setdefault(other, weights[name])
                elif other in weights:
                    weights[name] = weights[other]
        positions = weights.get("pos_embed")
        if positions is not None and positions.ndim == 3:
            side = int((positions.shape[1] - 1) ** 0.5)
            if side * side == positions.shape[1] - 1:
                weights["pos_embed"] = resize_tokens(positions, (side, side), self.config.grid)
        return super().load_official(weights)

    def _places(self) -> Iterator[tuple[str, str]]:
        first = 0
        for g, depth in enumerate(self.depths):
            for i in range(depth):
                yield f"groups.{g}.block_list.{i}.", f"blocks.{first + i}."
            first += depth


PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def _twins(group: int, first: int, depth: int) -> list[Entry]:
    return [
        tied(f"blocks.{first + i}.{part}.{w}", f"groups.{group}.block_list.{i}.{part}.{w}")
        for i in range(depth)
        for part in PARTS
        for w in ("weight", "bias")
    ]


def resize_tokens(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return positions (1, 1 + N, C), the class token's first, for another grid; bicubic."""
    if old == new:
        return positions
    grid = positions[:, 1:].mT.unflatten(2, old)
    return torch.cat((positions[:, :1], resize_map(grid, new).flatten(2).mT), 1)


register_variants(IARed2, "ia-red2", VARIANTS)
