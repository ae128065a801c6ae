"""Sizes of TransNeXt, and the published ones. H and W rows and columns of an image or a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyheads.attention.aggregated import PositionMode
from manyheads.config import Config

__all__ = ["TABLE", "TransNeXtConfig"]

_DIMS = (72, 144, 288, 576)
_DEEP = (5, 5, 22, 5)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransNeXtConfig(Config):
    """Sizes of a :class:`TransNeXt`; the defaults are TransNeXt-Tiny's.

    Attributes:
        depths, embed_dims, num_heads, mlp_ratios: of each stage; the MLP is 2/3 as wide.
        sr_ratios: pooling of each stage's keys; 1: attention among all places instead.
        window_sizes: of each stage, odd; not read where ``sr_ratios`` is 1.
        image_size: rows and columns, or one number for both, that position biases are made for.
        pretrain_size: side of the images of the first training, which coordinates are measured
            by: 224 for the weights at 384 too. None: the shorter side of ``image_size``.
        fixed_pool_size: side of the pooled maps whatever the image: cost is linear in its pixels.
        positions: for images of another size, "interpolation" (the bias of ``image_size`` is
            resized) or "extrapolation" (the bias is computed for the size).
        pixel_focused: without query embeddings, learned tokens and their biases in attention.
        patch_size: stride of the first convolution.
        in_channels, num_classes: of the images; 0 classes for features alone.
        qkv_bias: of the projections of queries, keys and values.
        drop_path: rate of the last block, the others' rise linearly to it.
        dropout, attention_dropout: on outputs, on attention weights.
        norm_eps: of the norms in blocks and behind stages.
        implementation: of aggregated attention, "auto", "shift" or "reference".
    """

    depths: tuple[int, ...] = (2, 2, 15, 2)
    embed_dims: tuple[int, ...] = _DIMS
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    mlp_ratios: tuple[float, ...] = (8, 8, 4, 4)
    sr_ratios: tuple[int, ...] = (8, 4, 2, 1)
    window_sizes: tuple[int, ...] = (3, 3, 3, 3)
    image_size: int | tuple[int, int] = 224
    pretrain_size: int | None = None
    fixed_pool_size: int | None = None
    positions: PositionMode = "interpolation"
    pixel_focused: bool = False
    patch_size: int = 4
    in_channels: int = 3
    num_classes: int = 1000
    qkv_bias: bool = True
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-6
    implementation: str = "auto"

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("embed_dims", "num_heads", "mlp_ratios", "sr_ratios", "window_sizes"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} names {len(getattr(self, name))} stages, depths {stages}")
        least = 2 * self.patch_size * 2 ** (stages - 1)
        if self.start < least:
            raise ValueError(
                f"pretrain_size {self.start} leaves the last stage a map of one place, by which "
                f"no distance can be measured: give at least {least}"
            )

    @property
    def start(self) -> int:
        """Side of the images of the first training."""
        return min(self.sides) if self.pretrain_size is None else self.pretrain_size

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of ``image_size``."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map for images of ``image_size``."""
        rows, columns = (-(-s // self.patch_size) for s in self.sides)
        for _ in range(stage):
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns

    def pretrain_grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of a stage's map in the first training, rounded down."""
        side = self.start // (self.patch_size * 2**stage)
        return side, side


def _config(size: str, **changes: Any) -> TransNeXtConfig:
    sizes: dict[str, dict[str, Any]] = {
        "micro": {"embed_dims": (48, 96, 192, 384), "num_heads": (2, 4, 8, 16)},
        "tiny": {},
        "small": {"depths": _DEEP},
        "base": {
            "depths": (5, 5, 23, 5),
            "embed_dims": (96, 192, 384, 768),
            "num_heads": (4, 8, 16, 32),
        },
    }
    return TransNeXtConfig(**(sizes[size] | changes))


def _names(*parts: str) -> tuple[str, ...]:
    """Names of files and of hubs: with _ and with -."""
    return tuple(mark.join(("transnext", *parts)) for mark in "_-")


_FINE = {"image_size": 384, "pretrain_size": 224}
_AAAA = {"sr_ratios": (16, 8, 4, 2), "image_size": 256}
TABLE: Mapping[str, tuple[TransNeXtConfig, tuple[str, ...]]] = {
    "transnext_micro": (_config("micro", drop_path=0.15), _names("micro", "224", "1k")),
    "transnext_tiny": (
        _config("tiny", drop_path=0.25),
        (*_names("tiny", "224", "1k"), "transnext"),
    ),
    "transnext_small": (_config("small", drop_path=0.45), _names("small", "224", "1k")),
    "transnext_base": (_config("base", drop_path=0.6), _names("base", "224", "1k")),
    "transnext_small_384": (
        _config("small", drop_path=0.45, **_FINE),
        _names("small", "384", "1k", "ft", "1k"),
    ),
    "transnext_base_384": (
        _config("base", drop_path=0.8, **_FINE),
        _names("base", "384", "1k", "ft", "1k"),
    ),
    "transnext_micro_aaaa": (
        _config("micro", drop_path=0.15, **_AAAA),
        ("transnext_micro_AAAA", *_names("micro", "AAAA", "256", "1k")),
    ),
}
