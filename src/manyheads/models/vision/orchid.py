"""Orchid for images: a plain ViT whose attention is a data-dependent convolution (2402.18508).

The paper publishes its mixing layer and the size of Orchid-ViT-b, 48M, alone: what stands around
the layer is a reconstruction. B batch, H and W rows and columns of patches, N = H · W, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention.orchid import OrchidConfig
from manyheads.config import Config
from manyheads.layers.grid import resize_positions
from manyheads.layers.keymap import KeyMap
from manyheads.models.base import register_variants
from manyheads.models.language.orchid_blocks import OrchidBlock, initialise
from manyheads.models.vision.base import VisionModel, run_blocks

__all__ = ["OrchidVision", "OrchidVisionConfig"]

_INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class OrchidVisionConfig(Config):
    """Sizes of the model; the defaults are the reconstruction of Orchid-ViT-b.

    Attributes:
        image_size: side of the images that the learned positions are made for; others are
            interpolated.
        patch_size: side of a patch.
        in_channels, num_classes: of the image; 0 classes for features alone.
        embed_dim, depth, mlp_width: sizes.
        mlp_blocks: blocks of the MLP's block-diagonal matrices, 1 for dense ones.
        gated_mlp: act(gate(x)) · up(x) inside the MLP instead of act(up(x)).
        max_length: patches that the static filters reach (None: those of ``image_size``).
        dropout, drop_path, norm_eps: as named; drop_path rises to this rate at the last block.
        mixer: further options of :class:`manyheads.attention.OrchidConfig`.
    """

    image_size: int = 224
    patch_size: int = 16
    in_channels: int = 3
    num_classes: int = 1000
    embed_dim: int = 768
    depth: int = 12
    mlp_width: int = 3072
    mlp_blocks: int = 4
    gated_mlp: bool = False
    max_length: int | None = None
    dropout: float = 0.0
    drop_path: float = 0.2
    norm_eps: float = 1e-6
    mixer: dict[str, Any] = field(default_factory=lambda: {"filter_width": 128})

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        self.mixer_config()

    @property
    def grid(self) -> int:
        """Patches on a side of the image that the positions are made for."""
        return self.image_size // self.patch_size

    def mixer_config(self) -> OrchidConfig:
        """Return the config of each mixer."""
        sizes = {"embed_dim": self.embed_dim, "max_length": self.max_length or self.grid**2}
        return OrchidConfig.from_dict(sizes | self.mixer)


class OrchidVision(VisionModel):
    """Vision transformer whose patches, row by row, are mixed by Orchid. Needs training.

    O(N log N) in the number of patches. Other image sizes run as far as ``max_length`` reaches;
    learned positions are interpolated. The surface is timm's.

    Example:
        >>> model = OrchidVision(OrchidVisionConfig(embed_dim=64, depth=2, mlp_width=128)).eval()
        >>> model(torch.randn(1, 3, 224, 160)).shape
        torch.Size([1, 1000])
    """

    config_class: ClassVar[type[Config]] = OrchidVisionConfig
    config: OrchidVisionConfig
    first_conv = "patch_embed"

    def __init__(self, config: OrchidVisionConfig) -> None:
        super().__init__()
        self.config = c = config
        self.num_classes, self.num_features = c.num_classes, c.embed_dim
        self.feature_info = [
            {"num_chs": c.embed_dim, "reduction": c.patch_size, "module": f"blocks.{i}"}
            for i in range(c.depth)
        ]
        self.patch_embed = nn.Conv2d(c.in_channels, c.embed_dim, c.patch_size, c.patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2, c.embed_dim))
        self.dropout = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            OrchidBlock(
                c.mixer_config(),
                c.mlp_width,
                mlp_blocks=c.mlp_blocks,
                gated_mlp=c.gated_mlp,
                dropout=c.dropout,
                drop_path=c.drop_path * i / max(c.depth - 1, 1),
                norm_eps=c.norm_eps,
            )
            for i in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head = self.make_classifier(c.num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=_INIT_STD)
        initialise(self, _INIT_STD)

    def iter_stages(self, x: Tensor) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Yield the patches (B, N, C) and their rows and columns after every block."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = run_blocks([block], x, checkpointing=self.grad_checkpointing)
            yield x, grid

    def as_map(self, x: tuple[Tensor, tuple[int, int]]) -> Tensor:
        return x[0].mT.unflatten(2, x[1])

    def finish(self, x: tuple[Tensor, tuple[int, int]]) -> Tensor:
        """Return the normalised features, (B, N, C)."""
        return self.norm(x[0])

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        """Return the map of any block with the last norm: all have its channels."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features (B, N, C) by their mean and classify; ``pre_logits``: pool alone."""
        pooled = x.mean(1)
        return pooled if pre_logits else self.head(pooled)

    def make_classifier(self, num_classes: int) -> nn.Module:
        head = super().make_classifier(num_classes)
        initialise(head, _INIT_STD)
        return head

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        last = (r"^(?:norm|head)", (99999,))
        return {
            "stem": r"^(?:patch_embed|pos_embed)",
            "blocks": r"^blocks\.(\d+)" if coarse else [(r"^blocks\.(\d+)", None), last],
        }

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Take images to patches (B, N, C), padding sides that do not divide with zeros."""
        size = self.config.patch_size
        below, right = (-side % size for side in x.shape[2:])
        if below or right:
            x = nn.functional.pad(x, (0, right, 0, below))
        x = self.patch_embed(x)
        rows, columns = x.shape[2:]
        x = x.flatten(2).mT + resize_positions(self.pos_embed, (rows, columns))
        return self.dropout(x), (rows, columns)

    def key_map(self) -> KeyMap:
        """Only the mixing layer was published."""
        raise ValueError(
            "OrchidVision has no official checkpoints, only its mixers have official names "
            "(OrchidAttention.load_official): use save() and load()"
        )


register_variants(
    OrchidVision, "orchid", {"orchid_vit_b": (OrchidVisionConfig(), ("orchid-vit-b",))}
)
