"""The published sizes of MASA and its baselines, as MixerLMs (2508.04581). Need training.

The paper names numbers of parameters, layers and widths; heads of 64 channels, rotary positions
and norms before the branches are choices of this library. Of its low-rank baseline it says rank
d/3; two factors save two thirds at d/6, which is taken here.
"""

from __future__ import annotations

from typing import Any

from manyheads.models.base import register_variants
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig

__all__: list[str] = []

# Size: layers, width, query heads that share a key-value head in the grouped baseline.
_SIZES = {"s": (12, 768, 6), "m": (24, 1024, 8), "l": (24, 1536, 6)}
_KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "qkvo": {"kind": "masa"},
    "qkv": {"kind": "masa", "projections": ("query", "key", "value")},
    "sequential": {"kind": "sequential"},
    "repeat": {"kind": "repeat"},
    "low_rank": {"kind": "low-rank"},
    "gqa": {},
}


def _config(size: str, kind: str) -> MixerLMConfig:
    layers, dim, group = _SIZES[size]
    heads = dim // 64
    sharing = _KINDS[kind]
    options: dict[str, Any] = {}
    if kind == "gqa":
        options = {"softmax": {"num_kv_heads": heads // group}}
    return MixerLMConfig(
        vocab_size=32000,
        embed_dim=dim,
        num_layers=layers,
        num_heads=heads,
        mixers="softmax",
        mixer_options=options,
        mlp="gelu",
        sharing={"atoms": layers // 3, **sharing} if sharing else {},
    )


register_variants(
    MixerLM,
    "masa",
    {f"masa_{kind}_{size}": (_config(size, kind), ()) for size in _SIZES for kind in _KINDS},
)
