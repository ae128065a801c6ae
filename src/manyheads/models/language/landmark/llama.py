"""LLaMA with landmarks (2305.16300). B batch, N length, C embed_dim, V vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from manyheads.attention.landmark import LandmarkAttention, LandmarkConfig
from manyheads.config import Config
from manyheads.errors import nearest
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap, constant, rename, tied
from manyheads.layers.mlp import GatedMLP
from manyheads.layers.norms import RMSNorm
from manyheads.models.base import register_variants
from manyheads.models.language.landmark.base import LandmarkBlock, LandmarkLM, LandmarkLMConfig

__all__ = ["LandmarkLlama", "LandmarkLlamaConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandmarkLlamaConfig(LandmarkLMConfig):
    """Sizes of a :class:`LandmarkLlama`, by default LLaMA-7B with one more token.

    Attributes:
        num_kv_heads: key-value heads (None: num_heads).
        mlp_width: hidden width of the gated MLP.
        norm_eps: of the RMS norms.
        tie_embeddings: whether the output matrix is the embedding.
    """

    vocab_size: int = 32001
    embed_dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    mlp_width: int = 11008
    landmark_id: int = 32000
    freq: int = 63
    train_context: int = 512
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> LandmarkLlamaConfig:
        """Read an official ``config.json``; ``mem_freq`` and ``mem_id`` stand in it too.

        Raises:
            ValueError: a key is neither known nor known to change nothing.
        """
        values: dict[str, Any] = {}
        for key, value in official.items():
            if key in _OFFICIAL:
                if value is not None:
                    values[_OFFICIAL[key]] = value
            elif key == "hidden_act":
                if value != "silu":
                    raise ValueError(f"hidden_act {value!r} is not LLaMA's: 'silu'")
            elif key not in _NO_EFFECT:
                known = [*_OFFICIAL, "hidden_act", *_NO_EFFECT]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        if "landmark_id" not in values and "vocab_size" in values:
            values["landmark_id"] = values["vocab_size"] - 1
        return cls.from_dict(values)


_OFFICIAL = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "layers": "num_layers",
    "heads": "num_heads",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rotary_theta",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "mem_id": "landmark_id",
    "mem_freq": "freq",
    "train_context_length": "train_context",
}
_NO_EFFECT = {
    "architectures",
    "bos_token_id",
    "cache_top_k",
    "dtype",
    "eos_token_id",
    "include_landmark_in_loss",
    "max_position_embeddings",
    "max_sequence_length",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class LandmarkLlama(LandmarkLM):
    """LLaMA with landmark attention; reads any length with a memory of blocks.

    A LLaMA has to be trained further with landmarks. ``load_official`` takes the names of
    transformers' Llama; :func:`apply_weight_diff` makes the published weights.

    Example:
        >>> config = LandmarkLlamaConfig(
        ...     vocab_size=50, landmark_id=49, embed_dim=64, num_layers=2, num_heads=4,
        ...     mlp_width=96, freq=5, train_context=60)
        >>> model = LandmarkLlama(config)
        >>> len(list(model.generate(torch.randint(49, (1, 100)), max_new_tokens=8)))
        8
    """

    config_class: ClassVar[type[Config]] = LandmarkLlamaConfig
    config: LandmarkLlamaConfig

    def __init__(self, config: LandmarkLlamaConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.layers = nn.ModuleList(self._block() for _ in range(c.num_layers))
        self.norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        self.apply(self._init)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def _block(self) -> LandmarkBlock:
        c = self.config
        mixer = LandmarkAttention(
            LandmarkConfig(
                embed_dim=c.embed_dim,
                num_heads=c.num_heads,
                num_kv_heads=c.num_kv_heads,
                block_size=c.block_size,
                rotary_theta=c.rotary_theta,
                group_dropout=c.group_dropout,
            )
        )
        norms = (RMSNorm(c.embed_dim, eps=c.norm_eps), RMSNorm(c.embed_dim, eps=c.norm_eps))
        return LandmarkBlock(norms, mixer, GatedMLP(c.embed_dim, c.mlp_width))

    def key_map(self) -> KeyMap:
        """Names of transformers' Llama; the rotary buffers of old files are written."""
        c = self.config
        ours, theirs = "layers.{}.", "model.layers.{}."
        pairs = [
            *((f"mixer.{n}_proj", f"self_attn.{n}_proj") for n in "qkv"),
            ("mixer.out_proj", "self_attn.o_proj"),
            *((f"mlp.{n}_proj", f"mlp.{n}_proj") for n in ("gate", "up", "down")),
            ("mixer_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ]
        half = c.embed_dim // c.num_heads // 2
        frequencies = c.rotary_theta ** (-torch.arange(half, device="cpu") / half)
        rotary = "model.layers.{}.self_attn.rotary_emb.inv_freq"
        head = tied("embed.weight", "lm_head.weight") if c.tie_embeddings else None
        return KeyMap(
            rename("embed.weight", "model.embed_tokens.weight"),
            *(rename(f"{ours}{a}.weight", f"{theirs}{b}.weight") for a, b in pairs),
            *(constant(rotary.format(i), frequencies, optional=True) for i in range(c.num_layers)),
            rename("norm.weight", "model.norm.weight"),
            head or rename("head.weight", "lm_head.weight"),
        )


register_variants(
    LandmarkLlama, "landmark", {"landmark_llama_7b": (LandmarkLlamaConfig(), ("llama7b",))}
)
