"""A small model of every vision family, quick enough to run everything on."""

from __future__ import annotations

from typing import Any

from manyheads.models import create_model

__all__ = ["SMALL", "small"]

# name: (variant, overrides, side of an image). One entry for every behaviour of a family.
SMALL: dict[str, tuple[str, dict[str, Any], int]] = {
    "poolformer": (
        "poolformer_s12",
        {"depths": (1, 1, 2, 1), "embed_dims": (16, 24, 32, 40), "num_classes": 7},
        64,
    ),
    "metaformer_ppaa": (
        "metaformer_ppaa_s12_224",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 64), "num_classes": 7,
         "image_size": 64},
        64,
    ),
    "metaformer_hall": (
        "poolformer_s12",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_classes": 7,
         "mixers": ("pool", "flow", "norm", "softmax"), "image_size": 64},
        64,
    ),
    "metaformer_aggregated": (
        "poolformer_s12",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_classes": 7,
         "mixers": ("pool", "aggregated", "aggregated", "length_scaled"), "image_size": 64},
        64,
    ),
    "transnext": (
        "transnext_tiny",
        {"depths": (1, 1, 2, 1), "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3),
         "mlp_ratios": (3, 3, 2, 2), "num_classes": 7, "image_size": 64},
        64,
    ),
    "transnext_extrapolation": (
        "transnext_micro_aaaa",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3),
         "mlp_ratios": (3, 3, 2, 2), "num_classes": 7, "image_size": 64,
         "window_sizes": (5, 3, 3, 3),
         "positions": "extrapolation"},
        96,
    ),
    "transnext_linear": (
        "transnext_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 12, 16, 24), "num_heads": (1, 2, 2, 3),
         "mlp_ratios": (3, 3, 2, 2), "num_classes": 7, "image_size": 64, "fixed_pool_size": 3,
         "pixel_focused": True},
        64,
    ),
    "soft": (
        "soft_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 4),
         "num_classes": 7, "image_size": 64},
        64,
    ),
    "soft_norm": (
        "soft_norm_tiny",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32), "num_heads": (2, 2, 2, 4),
         "num_classes": 7, "image_size": 96, "max_landmarks": 2},
        96,
    ),
    "dualtoken": (
        "dualtoken_vit_small",
        {"depths": (1, 2, 1), "embed_dims": (16, 16, 32), "num_heads": (2, 2, 4), "grid": 2,
         "neck_dim": 48, "num_classes": 7, "image_size": 64},
        64,
    ),
    "dualtoken_mlp": (
        "dualtoken_vit_small_mlp",
        {"depths": (1, 1, 1), "embed_dims": (16, 16, 32), "num_heads": (2, 2, 4), "grid": 2,
         "neck_dim": 48, "num_classes": 7, "image_size": 64},
        64,
    ),
    "volo": (
        "volo_d1",
        {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 4, 4, 4),
         "stem_dim": 8, "num_classes": 7, "image_size": 64},
        64,
    ),
    "volo_mean": (
        "volo_d1",
        {"depths": (2, 1, 1), "embed_dims": (12, 20, 20), "num_heads": (3, 2, 4),
         "mlp_ratios": (3, 4, 2), "stem_dim": 8, "num_classes": 7, "image_size": (64, 96),
         "class_blocks": 0, "dense": False, "global_pool": "avg", "qkv_bias": True,
         "kernel_size": 5, "stride": 1},
        64,
    ),
    "efficientformer": (
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40), "num_classes": 7,
         "image_size": 64},
        64,
    ),
    "efficientformer_one_head": (
        "efficientformer_l1",
        {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40), "num_classes": 7,
         "token_blocks": 2, "num_heads": 3, "key_dim": 6, "distillation": False},
        96,
    ),
    "mobilevig": (
        "mobilevig_ti",
        {"local_depths": (1, 1, 2), "local_dims": (8, 12, 16), "global_dims": (20,),
         "head_dim": 24, "num_classes": 7},
        64,
    ),
    "mobilevig_one_head": (
        "mobilevig_ti",
        {"local_depths": (1, 1), "local_dims": (8, 12), "global_depths": (1, 1),
         "global_dims": (16, 20), "head_dim": 24, "num_classes": 7, "distillation": False},
        64,
    ),
    "ia_red2": (
        "ia_red2_deit_small",
        {"groups": (1, 2, 1), "embed_dim": 48, "num_heads": 3, "interpreter_heads": 4,
         "first_score": 0.5, "num_classes": 7, "image_size": 64, "patch_size": 8},
        64,
    ),
    "ia_red2_whole": (
        "ia_red2_deit_small",
        {"groups": (1, 1, 1), "embed_dim": 24, "num_heads": 2, "num_classes": 7,
         "image_size": (64, 96), "qkv_bias": False},
        64,
    ),
    "flowformer": (
        "flowformer_vision_96",
        {"depths": (1, 1, 2, 1), "embed_dims": (12, 24, 24, 36), "num_classes": 7,
         "image_size": 64, "drop_path": 0.0},
        64,
    ),
    "orchid": (
        "orchid_vit_b",
        {"embed_dim": 32, "depth": 3, "mlp_width": 48, "num_classes": 7, "image_size": 64,
         "patch_size": 8, "max_length": 256, "drop_path": 0.0},
        64,
    ),
}  # fmt: skip


def small(name: str, **changes: Any) -> tuple[Any, int]:
    """Return the model and the side of its images."""
    variant, overrides, side = SMALL[name]
    return create_model(variant, **(overrides | changes)), side
