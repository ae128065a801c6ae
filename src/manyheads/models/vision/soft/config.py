"""Sizes of a SOFT backbone."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.config import Config

__all__ = ["SOFTConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SOFTConfig(Config):
    """Sizes of a :class:`SOFT`; the defaults are SOFT-Tiny's.

    Attributes:
        depths, embed_dims, num_heads: of each of the four stages.
        ratios: sides of the patches that give landmarks, in stages 1 to 3.
        conv_sizes: kernels of the local terms, in stages 1 to 3.
        mlp_ratios: hidden width over width; stages 1 to 3 have 4 officially.
        iterations, normalise, shared_step: as in :func:`manyheads.attention.soft.soft`.
        max_landmarks: as in :class:`manyheads.attention.soft.SoftAttention`; 7 keeps the cost
            linear beyond 224 px, None is official.
        image_size: rows and columns, or one number for both, that the learned positions are made
            for; they are resized, bilinearly, for other images.
        in_channels, num_classes: of the images; 0 classes for features alone.
        drop_path: rate of the last block, the others' rise linearly to it.
    """

    depths: tuple[int, ...] = (1, 2, 3, 2)
    embed_dims: tuple[int, ...] = (64, 128, 320, 512)
    num_heads: tuple[int, ...] = (2, 4, 10, 16)
    ratios: tuple[int, ...] = (8, 4, 2)
    conv_sizes: tuple[int, ...] = (9, 5, 3)
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    iterations: int = 20
    normalise: bool = False
    shared_step: bool = False
    max_landmarks: int | None = None
    image_size: int | tuple[int, int] = 224
    in_channels: int = 3
    num_classes: int = 1000
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for name, count in (
            ("depths", 4), ("embed_dims", 4), ("num_heads", 4), ("mlp_ratios", 4), ("ratios", 3),
            ("conv_sizes", 3),
        ):  # fmt: skip
            if len(getattr(self, name)) != count:
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} stages, it has to name {count}"
                )
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed_dims {dim} is not a multiple of num_heads {heads}")

    @property
    def least_size(self) -> int:
        """Side of the smallest image in which every stage has a landmark."""
        return max((r - 1) * 2 ** (i + 2) + 1 for i, r in enumerate(self.ratios))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's map for images of ``image_size``."""
        size = self.image_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return tuple((-(-rows // s), -(-columns // s)) for s in (4, 8, 16, 32))
