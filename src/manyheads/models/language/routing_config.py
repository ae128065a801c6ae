"""Sizes of the Routing Transformer, and those that were published."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from manyheads.attention.routing import RoutingConfig, Selection
from manyheads.config import Config
from manyheads.errors import nearest

__all__ = ["VARIANTS", "RoutingLMConfig", "timing_signal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingLMConfig(Config):
    """Sizes of a :class:`RoutingLM`; the layer's own options are those of RoutingConfig.

    Attributes:
        vocab_size: V; official models read id 0 as padding and as the start.
        embed_dim: C; token_dim: width of the embeddings (None: C).
        num_layers: post-norm layers, of which the first ``skip_first`` have local heads alone.
        local_heads, routing_heads, strided_heads: heads of the others.
        clusters, window, block, flange, relative: as in the layer.
        selection: "strict", or "official" (looks ahead, as trained).
        mlp: "geglu", or "relu" with biases; mlp_width is its hidden width.
        add_positions: sinusoidal positions on the embeddings.
        dropout: of embeddings; residual_dropout: of branches; attention_dropout, mlp_dropout:
            inside of them; target_dropout: share of input ids that ``loss`` replaces by 0.
    """

    vocab_size: int = 256
    embed_dim: int = 512
    token_dim: int | None = None
    num_layers: int = 12
    skip_first: int = 0
    local_heads: int = 4
    routing_heads: int = 4
    strided_heads: int = 0
    clusters: int = 8
    window: int = 64
    block: int = 64
    flange: int | None = None
    relative: int | None = None
    local_relative: bool = True
    cluster_relative: bool = True
    selection: Selection = "strict"
    share_qk: bool = True
    ema: bool = True
    decay: float = 0.999
    beta: float = 1e-4
    mlp: Literal["geglu", "relu"] = "geglu"
    mlp_width: int = 1536
    norm_eps: float = 1e-6
    add_positions: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.1
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    target_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.mlp not in ("geglu", "relu"):
            raise ValueError(f"mlp {self.mlp!r} is neither 'geglu' nor 'relu'")
        self.layer(self.num_layers - 1)

    @property
    def width(self) -> int:
        return self.embed_dim if self.token_dim is None else self.token_dim

    def layer(self, index: int) -> RoutingConfig:
        """Return the config of a layer; −1 is one behind ``skip_first``."""
        skipped = 0 <= index < self.skip_first
        extra = self.routing_heads if skipped else 0
        return RoutingConfig(
            embed_dim=self.embed_dim,
            num_heads=self.local_heads + self.routing_heads + self.strided_heads,
            local_heads=self.local_heads + extra,
            strided_heads=self.strided_heads,
            clusters=self.clusters,
            window=self.window,
            block=self.block,
            flange=self.flange,
            selection=self.selection,
            share_qk=self.share_qk,
            relative=self.relative,
            local_relative=self.local_relative,
            cluster_relative=self.cluster_relative,
            ema=self.ema,
            decay=self.decay,
            beta=self.beta,
            dropout=self.attention_dropout,
        )

    @classmethod
    def from_official(
        cls, official: Mapping[str, Any], *, selection: Selection = "official"
    ) -> RoutingLMConfig:
        """Read official hyperparameters; missing ones have their official defaults.

        Raises:
            ValueError: a key is unknown, or asks for what is not here (an encoder, hashing,
                heads strided by place).
        """
        values = dict(_DEFAULTS)
        for key, value in official.items():
            if key in _ABSENT:
                if value != _ABSENT[key]:
                    raise ValueError(f"{key}={value!r} is not here: only {_ABSENT[key]!r} is")
            elif key in _NAMES:
                values[_NAMES[key]] = value[0] if isinstance(value, list | tuple) else value
            elif key not in _NO_EFFECT and not key.startswith(_NO_EFFECT_PREFIXES):
                known = [*_NAMES, *_ABSENT, *_NO_EFFECT]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        values["mlp"] = {"geglu": "geglu", "dense_relu_dense": "relu"}.get(
            values["mlp"], values["mlp"]
        )
        if not values["routing_heads"]:
            values["clusters"] = values["window"] = 1
        return cls.from_dict(values | {"selection": selection})


_NAMES = {
    "vocab": "vocab_size",
    "hidden_size": "embed_dim",
    "embedding_dims": "token_dim",
    "num_decoder_layers": "num_layers",
    "sparsity_skip_first": "skip_first",
    "local_num_heads": "local_heads",
    "sparsity_cluster_num_heads": "routing_heads",
    "sparsity_cluster_strided_num_heads": "strided_heads",
    "sparsity_cluster_size": "clusters",
    "sparsity_cluster_attention_window": "window",
    "query_shape": "block",
    "memory_flange": "flange",
    "max_relative_position": "relative",
    "local_relative": "local_relative",
    "sparsity_cluster_relative": "cluster_relative",
    "share_qk": "share_qk",
    "ema": "ema",
    "decay": "decay",
    "beta": "beta",
    "ffn_layer": "mlp",
    "filter_size": "mlp_width",
    "norm_epsilon": "norm_eps",
    "add_timing_signal": "add_positions",
    "dropout": "dropout",
    "layer_prepostprocess_dropout": "residual_dropout",
    "attention_dropout": "attention_dropout",
    "relu_dropout": "mlp_dropout",
    "target_dropout": "target_dropout",
}
_DEFAULTS: dict[str, Any] = {
    "local_heads": 8, "routing_heads": 0, "clusters": 0, "window": 0, "block": 512, "flange": 512,
    "num_layers": 24, "relative": 1024, "mlp": "geglu", "mlp_width": 2048, "embed_dim": 512,
    "token_dim": 512,
}  # fmt: skip
_ABSENT: dict[str, Any] = {
    "num_encoder_layers": 0,
    "sparsity_strided_num_heads": 0,
    "hash_items": False,
    "attention_key_channels": 0,
    "attention_value_channels": 0,
    "label_smoothing": 0.0,
    "layer_preprocess_sequence": "none",
    "layer_postprocess_sequence": "dan",
}
_NO_EFFECT = {
    "batch", "batch_size", "cache_padding_bias", "clip_grad_norm", "fast_decode", "initializer",
    "initializer_gain", "input_dropout", "layer_prepostprocess_dropout_broadcast_dims",
    "max_length", "max_target_length", "memory_query_shape", "mode", "nucleus_sampling",
    "num_decode_cores", "pad_batch", "shared_embedding", "shared_embedding_and_softmax_weights",
    "sparsity_cluster_strided_relative", "sparsity_strided_relative", "summarize_vars",
    "token_bias_wt_trainable", "tpu_enable_host_call", "use_tpu", "weight_decay",
}  # fmt: skip
_NO_EFFECT_PREFIXES = ("optimizer", "learning_rate")


def timing_signal(positions: Tensor, dim: int) -> Tensor:
    """Return tensor2tensor's sines and cosines of positions (...): (..., C), float32."""
    half = dim // 2
    step = math.log(1e4) / max(half - 1, 1)
    scale = torch.exp(torch.arange(half, device=positions.device) * -step)
    angle = positions.float()[..., None] * scale
    parts = [angle.sin(), angle.cos()]
    if dim % 2:
        parts.append(torch.zeros_like(angle[..., :1]))
    return torch.cat(parts, -1)


def _enwik8(**sizes: Any) -> RoutingLMConfig:
    return RoutingLMConfig(
        **{
            "vocab_size": 258, "embed_dim": 1024, "num_layers": 12, "mlp_width": 3072,
            "local_heads": 4, "routing_heads": 4, "clusters": 16, "window": 512, "block": 256,
            "relative": 513,
        }
        | sizes
    )  # fmt: skip


def _wikitext(**sizes: Any) -> RoutingLMConfig:
    return RoutingLMConfig(
        **{
            "vocab_size": 267736, "embed_dim": 1024, "token_dim": 256, "num_layers": 14,
            "local_heads": 8, "routing_heads": 8, "clusters": 8, "window": 512, "block": 256,
            "relative": 513, "mlp_width": 3072, "dropout": 0.4, "attention_dropout": 0.4,
            "mlp_dropout": 0.4, "target_dropout": 0.25,
        }
        | sizes
    )  # fmt: skip


def _pg19(**sizes: Any) -> RoutingLMConfig:
    return RoutingLMConfig(
        **{
            "vocab_size": 98302, "embed_dim": 1032, "num_layers": 22, "skip_first": 21,
            "local_heads": 6, "routing_heads": 2, "clusters": 16, "window": 512, "block": 256,
            "relative": 513, "mlp_width": 4096,
        }
        | sizes
    )  # fmt: skip


def _pixels(**sizes: Any) -> RoutingLMConfig:
    """Images as sequences of 256 values, the vocabulary that is assumed; relu, biases."""
    return _enwik8(**{"vocab_size": 256, "mlp": "relu", "mlp_width": 2048} | sizes)


_ONLY_LOCAL = {"routing_heads": 0, "clusters": 1, "window": 1, "skip_first": 0}
_TABLE = {
    "pg19_local_cluster8k": _pg19(),
    "pg19_local8k": _pg19(num_layers=24, local_heads=8, **_ONLY_LOCAL),
    "wikitext103_local_cluster4k": _wikitext(),
    "wikitext103_local_cluster1k": _wikitext(clusters=2, num_layers=20, target_dropout=0.2),
    "wikitext103_local4k": _wikitext(local_heads=16, **_ONLY_LOCAL),
    "enwik8_local_cluster8k": _enwik8(),
    "enwik8_local_cluster12k": _enwik8(clusters=48, window=256, block=128, relative=257),
    "enwik8_local8k": _enwik8(
        num_layers=22, local_heads=8, attention_dropout=0.4, mlp_dropout=0.4, **_ONLY_LOCAL
    ),
    "enwik8_local12k": _enwik8(
        num_layers=22, local_heads=8, block=128, relative=257, attention_dropout=0.4,
        mlp_dropout=0.4, **_ONLY_LOCAL,
    ),
    "cifar10_local_cluster": _pixels(clusters=6),
    "imagenet_local_cluster": _pixels(
        num_layers=24, local_heads=12, clusters=8, window=2048
    ),
}  # fmt: skip
VARIANTS = {f"routing_{name}": (config, (name,)) for name, config in _TABLE.items()}
