"""Sizes of MetaFormers, and the published ones. H and W rows and columns of an image or a map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from manyheads.config import Config

__all__ = ["TABLE", "MetaFormerConfig"]

_DIMS = (64, 128, 320, 512)
_SHORT = (2, 2, 6, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class MetaFormerConfig(Config):
    """Sizes of a :class:`MetaFormer`; the defaults are PoolFormer-S12's.

    Attributes:
        depths, embed_dims, mlp_ratios: of each stage.
        mixers: token mixer of each stage, out of :func:`manyheads.attention.grid.list_mixers`;
            one name alone is taken for all stages.
        mixer_options: further options by mixer name.
        num_heads: of each stage, for mixers with heads; None: heads of 32 channels.
        norm: "group" (over channels and places of a map together) or "channel" (over the channels
            of each place).
        positions: stage before which learned positions are added, counted from 0; None: nowhere.
        image_size: rows and columns, or one number for both: of what positions and mixers of fixed
            size are made for. Positions are resized for other images.
        patch, down: kernel, stride and padding of the stem and between stages.
        downsamples: whether a convolution stands before each stage; where widths differ it does.
        in_channels, num_classes: of the images; 0 classes for features alone.
        layer_scale: first value of s1 and s2; None for none.
        drop_path: rate of the last block, the others' rise linearly to it.
        dropout: inside the MLPs.
        head_norm: "official" (norm, then mean) or "timm" (mean, then norm with eps 1e-6).
        stage_norms: a norm of its own for each stage's map and no head: for dense prediction.
        norm_eps: of all other norms.
    """

    depths: tuple[int, ...] = _SHORT
    embed_dims: tuple[int, ...] = _DIMS
    mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
    mixers: str | tuple[str, ...] = "pool"
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_heads: tuple[int, ...] | None = None
    norm: Literal["group", "channel"] = "group"
    positions: int | None = None
    image_size: int | tuple[int, int] = 224
    patch: tuple[int, int, int] = (7, 4, 2)
    down: tuple[int, int, int] = (3, 2, 1)
    downsamples: tuple[bool, ...] | None = None
    in_channels: int = 3
    num_classes: int = 1000
    layer_scale: float | None = 1e-5
    drop_path: float = 0.0
    dropout: float = 0.0
    head_norm: Literal["official", "timm"] = "official"
    stage_norms: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        stages = len(self.depths)
        for name in ("embed_dims", "mlp_ratios", "num_heads", "downsamples"):
            value = getattr(self, name)
            if value is not None and len(value) != stages:
                raise ValueError(f"{name} names {len(value)} stages, depths {stages}")
        if not isinstance(self.mixers, str) and len(self.mixers) != stages:
            raise ValueError(
                f"mixers names {len(self.mixers)} stages, depths {stages}: give one a stage, or "
                "one name for all"
            )
        for name, known in (("norm", ("group", "channel")), ("head_norm", ("official", "timm"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {known}")
        if self.positions is not None and not 0 <= self.positions < stages:
            raise ValueError(f"positions before stage {self.positions}: there are {stages} stages")
        for name in self.mixer_options:
            if name not in self.stage_mixers:
                raise ValueError(f"mixer_options names {name!r}, which no stage uses")

    @property
    def stage_mixers(self) -> tuple[str, ...]:
        """The mixer of each stage."""
        if isinstance(self.mixers, str):
            return (self.mixers,) * len(self.depths)
        return self.mixers

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of each stage's map for images of ``image_size``."""
        size = self.image_size
        sides = [size, size] if isinstance(size, int) else list(size)
        found = []
        for stage in range(len(self.depths)):
            if stage == 0 or self.has_down(stage):
                kernel, stride, padding = self.patch if stage == 0 else self.down
                sides = [(s + 2 * padding - kernel) // stride + 1 for s in sides]
            found.append((sides[0], sides[1]))
        return tuple(found)

    def has_down(self, stage: int) -> bool:
        """Whether a convolution stands before a stage; the stem stands before the first."""
        if stage == 0:
            return False
        asked = self.downsamples is None or self.downsamples[stage - 1]
        return asked or self.embed_dims[stage] != self.embed_dims[stage - 1]


def _config(depths: tuple[int, ...], wide: bool = False, **changes: Any) -> MetaFormerConfig:
    dims = (96, 192, 384, 768) if wide else _DIMS
    return MetaFormerConfig(depths=depths, embed_dims=dims, **changes)


def _mixed(mixers: str, **changes: Any) -> MetaFormerConfig:
    names = {"p": "pool", "a": "attention", "f": "spatial_fc", "i": "identity"}
    return _config(_SHORT, mixers=tuple(names[m] for m in mixers), **changes)


TABLE: Mapping[str, tuple[MetaFormerConfig, tuple[str, ...]]] = {
    "poolformer_s12": (_config(_SHORT, drop_path=0.1), ("metaformer_s12", "poolformer")),
    "poolformer_s24": (_config((4, 4, 12, 4), drop_path=0.1), ()),
    "poolformer_s36": (_config((6, 6, 18, 6), drop_path=0.2, layer_scale=1e-6), ()),
    "poolformer_m36": (_config((6, 6, 18, 6), True, drop_path=0.3, layer_scale=1e-6), ()),
    "poolformer_m48": (_config((8, 8, 24, 8), True, drop_path=0.4, layer_scale=1e-6), ()),
    "metaformer_id_s12": (_mixed("iiii", drop_path=0.1), ()),
    "metaformer_pppf_s12_224": (_mixed("pppf", drop_path=0.1), ()),
    "metaformer_ppff_s12_224": (_mixed("ppff", drop_path=0.1), ()),
    "metaformer_pppa_s12_224": (_mixed("pppa", norm="channel", positions=3, drop_path=0.1), ()),
    "metaformer_ppaa_s12_224": (_mixed("ppaa", norm="channel", positions=2, drop_path=0.1), ()),
}
