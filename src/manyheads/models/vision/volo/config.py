"""Sizes of VOLO (2106.13112), and the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from manyheads.config import Config
from manyheads.errors import nearest

__all__ = ["VARIANTS", "VOLOConfig"]

# Sides of images in training and in fine-tuning, and the crop of the published evaluation.
_CROPS = {224: 0.96, 384: 1.0, 448: 1.0, 512: 1.15}


@dataclass(frozen=True, kw_only=True, slots=True)
class VOLOConfig(Config):
    """Sizes of a :class:`VOLO`; the defaults are VOLO-D1's at 224.

    Attributes:
        depths, embed_dims, num_heads, mlp_ratios: of each stage; the first is of outlookers, the
            others of transformer blocks.
        stem_dim: channels of the three convolutions before the patches are cut.
        image_size: rows and columns, or one number for both, that the positions are made for;
            multiples of 16. Positions are resized for other images.
        kernel_size, stride: K and s of outlook attention.
        class_blocks: class attention blocks behind the last stage; 0: no class token either.
        dense: a second classifier on every patch token, which token labels train; its largest
            logits over the tokens are added, by half, to those of the class token.
        token_labels: in training mode the call returns what :meth:`VOLO.forward_train` returns;
            without, it returns logits in either mode.
        mix_token: whether ``forward_train`` mixes tokens of two images.
        global_pool: what the classifier reads: the first "token", the mean ("avg") of all, or ""
            for each of them.
        in_channels, num_classes: of the images; 0 classes for features alone.
        qkv_bias: in all attention.
        drop_path: rate of the last transformer block; the others' rise linearly to it, counted
            from the first outlooker.
        outlook_drop_path: give outlookers their share too; the official code leaves it out.
        dropout, position_dropout, attention_dropout: before the classifier, behind the
            positions, of attention weights.
        crop_pct: share of an image's side that evaluation crops.
    """

    depths: tuple[int, ...] = (4, 4, 8, 2)
    embed_dims: tuple[int, ...] = (192, 384, 384, 384)
    num_heads: tuple[int, ...] = (6, 12, 12, 12)
    mlp_ratios: tuple[float, ...] = (3, 3, 3, 3)
    stem_dim: int = 64
    image_size: int | tuple[int, int] = 224
    kernel_size: int = 3
    stride: int = 2
    class_blocks: int = 2
    dense: bool = True
    token_labels: bool = False
    mix_token: bool = True
    global_pool: Literal["token", "avg", ""] = "token"
    in_channels: int = 3
    num_classes: int = 1000
    qkv_bias: bool = False
    drop_path: float = 0.0
    outlook_drop_path: bool = False
    dropout: float = 0.0
    position_dropout: float = 0.0
    attention_dropout: float = 0.0
    crop_pct: float = 0.96

    def __post_init__(self) -> None:
        for name in ("embed_dims", "num_heads", "mlp_ratios"):
            if len(getattr(self, name)) != len(self.depths):
                raise ValueError(
                    f"{name} names {len(getattr(self, name))} stages, depths {len(self.depths)}"
                )
        if len(self.depths) < 2:
            raise ValueError(
                f"depths {self.depths}: give a stage of outlookers and at least one behind it"
            )
        if len(set(self.embed_dims[1:])) > 1:
            raise ValueError(
                f"embed_dims {self.embed_dims}: all stages behind the first have one width, "
                "because nothing stands between them"
            )
        for dim, heads in zip(self.embed_dims, self.num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"embed dim {dim} is not a multiple of {heads} heads")
        if self.global_pool not in ("token", "avg", ""):
            raise ValueError(f"global_pool {self.global_pool!r} must be 'token', 'avg' or ''")
        if self.token_labels and not self.has_token_labels:
            raise ValueError(
                "token_labels=True needs dense=True, global_pool='token' and class_blocks: token "
                "labels train the classifier of patch tokens beside that of the class token"
            )
        for name, side in zip(("height", "width"), self.sides, strict=True):
            if side < 16 or side % 16:
                raise ValueError(f"image_size: {name} {side} is not a positive multiple of 16")

    @property
    def has_token_labels(self) -> bool:
        """Whether there is a class token and a classifier of the patch tokens beside."""
        return self.dense and self.global_pool == "token" and self.class_blocks > 0

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the images that the positions are made for."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens behind the first stage."""
        return self.sides[0] // 16, self.sides[1] // 16

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> VOLOConfig:
        """Read the arguments of the official class, with its own defaults for what is missing.

        ``return_mean`` becomes ``global_pool="avg"``; where the official class returns token
        logits in training, ``token_labels`` is on.

        Raises:
            ValueError: an argument that is unknown, or that only other models than VOLO have.
        """
        c: dict[str, Any] = {
            "img_size": 224, "in_chans": 3, "num_classes": 1000, "patch_size": 8,
            "stem_hidden_dim": 64, "qkv_bias": False, "drop_rate": 0.0, "attn_drop_rate": 0.0,
            "drop_path_rate": 0.0, "post_layers": None, "return_mean": False,
            "return_dense": True, "mix_token": True, "pooling_scale": 2, "out_kernel": 3,
            "out_stride": 2, "out_padding": 1, "qk_scale": None,
        }  # fmt: skip
        sizes = ("layers", "embed_dims", "num_heads", "mlp_ratios")
        fixed = {"downsamples", "outlook_attention"}
        for key in official:
            if key not in {*c, *sizes, *fixed}:
                raise ValueError(
                    f"the official class has no argument {key!r}{nearest(key, [*c, *sizes])}"
                )
        for name in fixed & official.keys():
            first = tuple(bool(v) for v in official[name])
            if first != (True, *(False for _ in first[1:])):
                raise ValueError(
                    f"{name} {list(first)}: in VOLO it is so for the first stage alone"
                )
        c |= {k: v for k, v in official.items() if k not in fixed}
        for name, only in (("patch_size", 8), ("pooling_scale", 2), ("qk_scale", None)):
            if c[name] != only:
                raise ValueError(f"{name} {c[name]!r}: VOLO has {only!r} alone")
        if c["out_padding"] != c["out_kernel"] // 2:
            raise ValueError(f"out_padding {c['out_padding']} must be half of out_kernel")
        if set(c["post_layers"] or ()) - {"ca"}:
            raise ValueError(f"post_layers {c['post_layers']!r}: the official code has 'ca' alone")
        if c["return_mean"] and (c["mix_token"] or c["return_dense"]):
            raise ValueError(
                "return_mean excludes mix_token and return_dense, which are on unless turned off"
            )
        if c["mix_token"] and not c["return_dense"]:
            raise ValueError("mix_token needs return_dense: its tokens are unmixed in the logits")
        return cls.from_dict(
            {
                "depths": tuple(c["layers"]),
                "embed_dims": tuple(c["embed_dims"]),
                "num_heads": tuple(c["num_heads"]),
                "mlp_ratios": tuple(c["mlp_ratios"]),
                "stem_dim": c["stem_hidden_dim"],
                "image_size": c["img_size"],
                "kernel_size": c["out_kernel"],
                "stride": c["out_stride"],
                "class_blocks": len(c["post_layers"] or ()),
                "dense": c["return_dense"],
                "token_labels": c["return_dense"] and bool(c["post_layers"]),
                "mix_token": c["mix_token"],
                "global_pool": "avg" if c["return_mean"] else "token",
                "in_channels": c["in_chans"],
                "num_classes": c["num_classes"],
                "qkv_bias": c["qkv_bias"],
                "drop_path": c["drop_path_rate"],
                "position_dropout": c["drop_rate"],
                "attention_dropout": c["attn_drop_rate"],
            }
        )


_SIZES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "volo_d1": ({"drop_path": 0.1}, (224, 384)),
    "volo_d2": (
        {"depths": (6, 4, 10, 4), "embed_dims": (256, 512, 512, 512),
         "num_heads": (8, 16, 16, 16), "drop_path": 0.2},
        (224, 384),
    ),
    "volo_d3": (
        {"depths": (8, 8, 16, 4), "embed_dims": (256, 512, 512, 512),
         "num_heads": (8, 16, 16, 16), "drop_path": 0.5},
        (224, 448),
    ),
    "volo_d4": (
        {"depths": (8, 8, 16, 4), "embed_dims": (384, 768, 768, 768),
         "num_heads": (12, 16, 16, 16)},
        (224, 448),
    ),
    "volo_d5": (
        {"depths": (12, 12, 20, 4), "embed_dims": (384, 768, 768, 768),
         "num_heads": (12, 16, 16, 16), "mlp_ratios": (4, 4, 4, 4), "stem_dim": 128},
        (224, 448, 512),
    ),
}  # fmt: skip


def _variants() -> dict[str, tuple[VOLOConfig, tuple[str, ...]]]:
    table: dict[str, tuple[VOLOConfig, tuple[str, ...]]] = {}
    for name, (sizes, sides) in _SIZES.items():
        for side in sides:
            wide = name in ("volo_d4", "volo_d5") and side > 224
            config = VOLOConfig(image_size=side, crop_pct=1.15 if wide else _CROPS[side], **sizes)
            first = side == sides[0]
            # The published files carry no size in their names at 224; timm's always do.
            aliases = (f"{name}_{side}",) if first else ()
            table[name if first else f"{name}_{side}"] = (config, aliases)
    return table


VARIANTS = _variants()
