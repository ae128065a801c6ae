"""Token mixers on maps (B, C, H, W), by name."""

from manyheads.attention.grid.registry import (
    GridShape,
    Mixer,
    build_mixer,
    get_mixer,
    list_mixers,
    register_mixer,
)

__all__ = ["GridShape", "Mixer", "build_mixer", "get_mixer", "list_mixers", "register_mixer"]
