"""Sizes of DeiT with interpreters (2106.12620), and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from manyheads.config import Config

__all__ = ["VARIANTS", "IARed2Config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IARed2Config(Config):
    """Sizes of an :class:`IARed2`; the defaults are DeiT-S/16's at 224 in three groups.

    Attributes:
        groups: blocks behind each interpreter.
        embed_dim, num_heads, mlp_ratio, qkv_bias: of all blocks.
        patch_size: rows and columns of pixels a token.
        image_size: rows and columns, or one number for both, that the positions are made for;
            they are resized for other images.
        interpreter_heads: of every interpreter, whatever the width.
        first_score: that a new interpreter gives every token; above the threshold a new model
            drops nothing.
        threshold: tokens that score above it are kept.
        in_channels, num_classes: of the images; 0 classes for features alone.
        drop_path: rate of the last block; the others' rise linearly to it.
        dropout: behind the positions, in MLPs and projections, and before the head.
        norm_eps: of all norms but the interpreters'.
    """

    groups: tuple[int, ...] = (4, 4, 4)
    embed_dim: int = 384
    num_heads: int = 6
    mlp_ratio: float = 4
    qkv_bias: bool = True
    patch_size: int = 16
    image_size: int | tuple[int, int] = 224
    interpreter_heads: int = 6
    first_score: float = 0.7
    threshold: float = 0.5
    in_channels: int = 3
    num_classes: int = 1000
    drop_path: float = 0.0
    dropout: float = 0.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_groups(self.groups)
        for name, heads in (
            ("num_heads", self.num_heads), ("interpreter_heads", self.interpreter_heads)
        ):  # fmt: skip
            if heads < 1 or self.embed_dim % heads:
                raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of {name} {heads}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold {self.threshold} must lie in [0, 1)")
        for name, side in zip(("height", "width"), self.sides, strict=True):
            if side < self.patch_size or side % self.patch_size:
                raise ValueError(
                    f"image_size: {name} {side} is not a positive multiple of the patch "
                    f"{self.patch_size}"
                )

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the images that the positions are made for."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.sides[0] // self.patch_size, self.sides[1] // self.patch_size


def check_groups(groups: tuple[int, ...], blocks: int | None = None) -> tuple[int, ...]:
    """Return the groups after checking that each has a block, and all together ``blocks``.

    Raises:
        ValueError: no group, an empty one, or another sum.
    """
    if not groups or min(groups) < 1:
        raise ValueError(f"groups {groups}: give the number of blocks of each group, 1 or more")
    if blocks is not None and sum(groups) != blocks:
        raise ValueError(
            f"groups {groups} hold {sum(groups)} blocks, the model has {blocks}: they must be "
            "the same"
        )
    return groups


VARIANTS: Mapping[str, tuple[IARed2Config, tuple[str, ...]]] = {
    "ia_red2_deit_small": (IARed2Config(), ("deit_small", "interp_deit_small_patch16_224")),
    "ia_red2_deit_base": (
        IARed2Config(embed_dim=768, num_heads=12),
        ("deit_base", "interp_deit_base_patch16_224"),
    ),
}
