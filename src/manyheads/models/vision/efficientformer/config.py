"""Sizes of an EfficientFormer."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.config import Config

__all__ = ["EfficientFormerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficientFormerConfig(Config):
    """Sizes of an :class:`EfficientFormer`; the defaults are L1's.

    Attributes:
        depths, embed_dims: blocks and channels of each stage.
        token_blocks: blocks with attention, the last so many of the last stage.
        mlp_ratio: hidden channels of every MLP over its channels.
        pool_size: side of the pooling's window, odd.
        num_heads, key_dim, value_ratio: of the attention.
        image_size: rows and columns, or one number for both, that biases are made for.
        in_channels, num_classes: of the images; 0 classes for features alone.
        distillation: two classifiers, averaged in use.
        layer_scale: first value of s1 and s2.
        drop_path: rate of the last block, the others' rise linearly to it.
        dropout: inside the MLPs.
        stage_norms: for dense prediction: a norm of its own for each stage's map, no head, and a
            bias table for maps of 16 x 16 whose matrix is resized as a picture.
        norm_eps: of all layer norms.
    """

    depths: tuple[int, ...] = (3, 2, 6, 4)
    embed_dims: tuple[int, ...] = (48, 96, 224, 448)
    token_blocks: int = 1
    mlp_ratio: float = 4
    pool_size: int = 3
    num_heads: int = 8
    key_dim: int = 32
    value_ratio: float = 4
    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    num_classes: int = 1000
    distillation: bool = True
    layer_scale: float = 1e-5
    drop_path: float = 0.0
    dropout: float = 0.0
    stage_norms: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if len(self.embed_dims) != len(self.depths):
            raise ValueError(
                f"embed_dims names {len(self.embed_dims)} stages, depths {len(self.depths)}"
            )
        if not 0 <= self.token_blocks <= self.depths[-1]:
            raise ValueError(
                f"token_blocks {self.token_blocks}: the last stage has {self.depths[-1]} blocks"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last map for images of ``image_size``."""
        size = self.image_size
        rows, columns = (size, size) if isinstance(size, int) else size
        for _ in range(len(self.depths) + 1):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns

    def is_token_block(self, stage: int, block: int) -> bool:
        """Whether a block works on tokens."""
        last = len(self.depths) - 1
        return stage == last and block >= self.depths[last] - self.token_blocks
