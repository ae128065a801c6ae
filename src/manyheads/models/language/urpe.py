"""The URPE encoder: post-norm transformer layers that share two relative tables (2205.13401).

B batch, N length, C embed dim, H heads, V vocabulary, R max length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from manyheads.attention.urpe import URPEAttention, URPEConfig
from manyheads.attention.urpe.module import TableKind, build_table
from manyheads.config import Config
from manyheads.errors import nearest, unknown_name
from manyheads.layers.activations import activation
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap, rename, tied
from manyheads.layers.ragged import check_mask
from manyheads.layers.relative import Beyond, RelativeTable
from manyheads.models.base import Model, register_variants

__all__ = ["URPEEncoder", "URPEEncoderConfig"]

_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class URPEEncoderConfig(Config):
    """Sizes and options of the encoder; the defaults are those of the published synthetic tasks.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, mlp_width: sizes.
        max_length: R, the length that unique tables cover, and on whose grid buckets are numbered.
        beyond: "error" or "clamp" for longer input.
        padding_id: the token that is padding (also without a mask).
        embed_norm: whether a LayerNorm follows the embedding; the layers are post-norm either way.
        bias, multiplier: "unique", "bucketed" or "none".
        bias_buckets, multiplier_buckets: (num_buckets, max_distance) of bucketed tables.
        multiplier_init: "one" (starts as attention with a relative bias) or "normal".
        activation: of the layers and of the head.
        tie_embeddings: the head's matrix is the embedding.
        dropout, attention_dropout, activation_dropout: in training.
        init_std: of linear and embedding weights and of tables.
    """

    vocab_size: int = 1011
    embed_dim: int = 768
    num_layers: int = 3
    num_heads: int = 12
    mlp_width: int = 3072
    max_length: int = 128
    beyond: Beyond = "error"
    padding_id: int = 1
    embed_norm: bool = True
    bias: TableKind = "unique"
    multiplier: TableKind = "unique"
    bias_buckets: tuple[int, int] = (64, 128)
    multiplier_buckets: tuple[int, int] = (64, 128)
    multiplier_init: Literal["one", "normal"] = "one"
    activation: str = "gelu"
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.padding_id < self.vocab_size:
            raise ValueError(
                f"padding_id {self.padding_id} is outside vocabulary {self.vocab_size}"
            )
        for kind in (self.bias, self.multiplier):
            if kind not in ("unique", "bucketed", "none"):
                raise unknown_name("kind of table", kind, ("unique", "bucketed", "none"))

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> URPEEncoderConfig:
        """Read the arguments of the official sentence encoder.

        Raises:
            ValueError: a key is neither known nor known to change nothing, or asks for what the
                published encoder does without (segments, absolute positions).
        """
        known = [*_OFFICIAL, *_TABLES, *_NO_EFFECT, *_ABSENT]
        for key, value in official.items():
            if key not in known:
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
            if key in _ABSENT and value:
                raise ValueError(f"{key}={value!r}: the published encoder has {_ABSENT[key]}")
        values = {ours: official[key] for key, ours in _OFFICIAL.items() if key in official}
        if "activation" in values:
            values["activation"] = _ACTIVATIONS.get(values["activation"], values["activation"])
        for ours, switch, unique, buckets in (
            ("bias", "rel_pos", "rel_pos_unique", ("rp_bucket", "max_rp")),
            ("multiplier", "ur_attn", "ur_attn_unique", ("ur_rp_bucket", "ur_max_rp")),
        ):
            kind = "unique" if official.get(unique, False) else "bucketed"
            values[ours] = kind if official.get(switch, False) else "none"
            fallback = (64, 128)
            sizes = tuple(official.get(k, d) for k, d in zip(buckets, fallback, strict=True))
            values[f"{ours}_buckets"] = sizes
        return cls.from_dict(values)


_OFFICIAL = {
    "padding_idx": "padding_id",
    "vocab_size": "vocab_size",
    "num_encoder_layers": "num_layers",
    "embedding_dim": "embed_dim",
    "ffn_embedding_dim": "mlp_width",
    "num_attention_heads": "num_heads",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "max_seq_len": "max_length",
    "encoder_normalize_before": "embed_norm",
    "activation_fn": "activation",
}
_TABLES = {
    "rel_pos", "rel_pos_unique", "rp_bucket", "max_rp",
    "ur_attn", "ur_attn_unique", "ur_rp_bucket", "ur_max_rp",
}  # fmt: skip
_NO_EFFECT = {"apply_bert_init", "batch", "seq", "ur_attn_with_relu"}
_ABSENT = {"num_segments": "no segments", "use_position_embeddings": "no absolute positions"}
_ACTIVATIONS = {"gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh", "linear": "identity"}


class _Layer(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x))."""

    def __init__(self, config: URPEEncoderConfig) -> None:
        super().__init__()
        c = config
        self.attention = URPEAttention(
            URPEConfig(
                embed_dim=c.embed_dim,
                num_heads=c.num_heads,
                is_causal=False,
                bias="none",
                multiplier="none",
                dropout=c.attention_dropout,
                count_padding=True,
            )
        )
        self.attention_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS)
        self.up_proj = Linear(c.embed_dim, c.mlp_width)
        self.down_proj = Linear(c.mlp_width, c.embed_dim)
        self.mlp_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS)
        self.act = activation(c.activation)
        self.dropout = nn.Dropout(c.dropout)
        self.activation_dropout = nn.Dropout(c.activation_dropout)

    def forward(
        self, x: Tensor, mask: Tensor, bias: Tensor | None, multiplier: Tensor | None
    ) -> Tensor:
        mixed = self.attention(x, mask=mask, bias=bias, multiplier=multiplier)
        x = self.attention_norm(x + self.dropout(mixed))
        hidden = self.activation_dropout(self.act(self.up_proj(x)))
        return self.mlp_norm(x + self.dropout(self.down_proj(hidden)))


class URPEEncoder(Model):
    """Bidirectional encoder with a vocabulary head, of the paper's synthetic tasks. Needs training.

    One bias table inside the softmax and one multiplier table behind it serve all layers; there
    are no absolute positions. Distances are counted by place, padding included.

    Example:
        >>> config = URPEEncoderConfig(vocab_size=50, embed_dim=32, num_heads=4, mlp_width=64)
        >>> URPEEncoder(config)(torch.randint(11, 50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    config_class: ClassVar[type[Config]] = URPEEncoderConfig
    config: URPEEncoderConfig

    def __init__(self, config: URPEEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim, padding_idx=c.padding_id)
        self.embed_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS) if c.embed_norm else None
        self.bias = build_table(
            c.bias, c.num_heads, c.max_length,
            buckets=c.bias_buckets, init="normal", beyond=c.beyond,
        )  # fmt: skip
        self.multiplier = build_table(
            c.multiplier, c.num_heads, c.max_length,
            buckets=c.multiplier_buckets, init=c.multiplier_init, beyond=c.beyond,
        )  # fmt: skip
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_layers))
        self.dropout = nn.Dropout(c.dropout)
        self.head_dense = Linear(c.embed_dim, c.embed_dim)
        self.head_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS)
        self.head = Linear(c.embed_dim, c.vocab_size)
        self.act = activation(c.activation)
        self.apply(self._init)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, RelativeTable) and module.init == "normal":
            nn.init.normal_(module.weight, std=self.config.init_std)

    def features(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the last layer's output (B, N, C); arguments as :meth:`forward`."""
        mask = check_mask(mask, tokens.shape[0], tokens.shape[1])
        real = tokens != self.config.padding_id
        mask = real if mask is None else mask & real
        x = self.embed(tokens)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x) * mask[..., None].to(x.dtype)
        length = tokens.shape[1]
        bias = None if self.bias is None else self.bias.toeplitz(length)
        multiplier = None if self.multiplier is None else self.multiplier.toeplitz(length)
        for layer in self.layers:
            x = layer(x, mask, bias, multiplier)
        return x

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, N, V).

        Args:
            tokens: (B, N); ``padding_id`` is never attended to.
            mask: (B, N), True = a real token, beside the padding id.

        Raises:
            ValueError: longer than ``max_length`` with beyond="error".
        """
        x = self.act(self.head_dense(self.features(tokens, mask=mask)))
        return self.head(self.head_norm(x))

    def key_map(self) -> KeyMap:
        """Names of the official code, a fork of fairseq."""
        ours, theirs = "layers.{}.", "encoder.sentence_encoder.layers.{}."
        layer = (
            *((f"attention.{n}_proj", f"self_attn.{n}_proj") for n in ("q", "k", "v", "out")),
            ("attention_norm", "self_attn_layer_norm"),
            ("up_proj", "fc1"),
            ("down_proj", "fc2"),
            ("mlp_norm", "final_layer_norm"),
        )
        kinds = ("weight", "bias")
        head = tied if self.config.tie_embeddings else rename
        return KeyMap(
            rename("embed.weight", "encoder.sentence_encoder.embed_tokens.weight"),
            rename("bias.weight", "encoder.sentence_encoder.rp_bias.weight"),
            rename("multiplier.weight", "encoder.sentence_encoder.ur_rp_bias.weight"),
            *(
                rename(f"embed_norm.{k}", f"encoder.sentence_encoder.emb_layer_norm.{k}")
                for k in kinds
            ),
            *(rename(f"{ours}{a}.{k}", f"{theirs}{b}.{k}") for a, b in layer for k in kinds),
            *(rename(f"head_dense.{k}", f"encoder.lm_head.dense.{k}") for k in kinds),
            *(rename(f"head_norm.{k}", f"encoder.lm_head.layer_norm.{k}") for k in kinds),
            head(
                "embed.weight" if self.config.tie_embeddings else "head.weight",
                "encoder.lm_head.weight",
            ),
            rename("head.bias", "encoder.lm_head.bias"),
        )


register_variants(
    URPEEncoder,
    "urpe",
    {
        "urpe_synthetic": (URPEEncoderConfig(), ("synthetic_vocab1000",)),
        "urpe_synthetic_untied": (
            URPEEncoderConfig(tie_embeddings=False),
            ("synthetic_vocab1000_untied",),
        ),
    },
)
