"""BERT with a clipped softmax or gated heads, for masked language modelling (2306.12929).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.keymap import Entry, KeyMap, rename
from manyheads.layers.ragged import check_mask
from manyheads.models.base import Model, register_variants
from manyheads.models.language.quantizable.attention import ActivatedLinear, BERTSelfAttention
from manyheads.models.language.quantizable.config import QuantizableConfig, read_official

__all__ = ["QuantizableBERT", "QuantizableBERTConfig", "masked_token_loss"]


def masked_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy in nats of the labels that are not −100: logits (B, N, V), (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizableBERTConfig(QuantizableConfig):
    """Sizes of a :class:`QuantizableBERT`, by default those of BERT-base (uncased).

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, mlp_width: sizes.
        max_positions: rows of the position table.
        token_types: rows of the token type table.
        activation: of the MLP and of the head.
        norm_eps, init_std: as named.
        dropout, attention_dropout: in training.
        padding_id: the token whose embedding is not trained.
    """

    vocab_size: int = 30522
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.1
    padding_id: int = 0

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> QuantizableBERTConfig:
        """Read a Hugging Face config of BERT with the options of the official attention.

        Raises:
            ValueError: a key is unknown; the nearest is named.
        """
        return cls.from_dict(read_official(official, _OFFICIAL, _NO_EFFECT))


_OFFICIAL = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "token_types",
    "hidden_act": "activation",
    "layer_norm_eps": "norm_eps",
    "initializer_range": "init_std",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "pad_token_id": "padding_id",
}
_NO_EFFECT = ("architectures", "model_type", "position_embedding_type", "use_cache")


class _Layer(nn.Module):
    """x = norm(x + attention(x)); x = norm(x + mlp(x)), each sum tapped."""

    def __init__(self, config: QuantizableBERTConfig) -> None:
        super().__init__()
        c = config
        self.attention = BERTSelfAttention(c.embed_dim, c.num_heads, c, dropout=c.attention_dropout)
        self.attention_tap = nn.Identity()
        self.attention_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.fc1 = ActivatedLinear(c.embed_dim, c.mlp_width, c.activation)
        self.fc2 = nn.Linear(c.mlp_width, c.embed_dim)
        self.mlp_tap = nn.Identity()
        self.mlp_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        mixed = self.dropout(self.attention(x, bias))
        x = self.attention_norm(self.attention_tap(mixed + x))
        return self.mlp_norm(self.mlp_tap(self.dropout(self.fc2(self.fc1(x))) + x))


class QuantizableBERT(Model):
    """BERT whose heads can do nothing without outliers. Bidirectional. Needs training.

    Example:
        >>> config = QuantizableBERTConfig(vocab_size=50, embed_dim=32, num_layers=2, num_heads=4,
        ...     mlp_width=64, gamma=-0.03)
        >>> QuantizableBERT(config)(torch.randint(50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    config_class: ClassVar[type[Config]] = QuantizableBERTConfig
    config: QuantizableBERTConfig

    def __init__(self, config: QuantizableBERTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim, padding_idx=c.padding_id)
        self.type_embed = nn.Embedding(c.token_types, c.embed_dim)
        self.position_embed = nn.Embedding(c.max_positions, c.embed_dim)
        self.type_tap, self.position_tap = nn.Identity(), nn.Identity()
        self.embed_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_layers))
        self.head_dense = nn.Linear(c.embed_dim, c.embed_dim)
        self.head_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.act = activation(c.activation)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    def features(
        self, tokens: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return the last layer's output (B, N, C); arguments as :meth:`forward`."""
        length = tokens.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"length {length} exceeds the {self.config.max_positions} positions of the model: "
                "cut the input, or build it with more max_positions"
            )
        mask = check_mask(mask, *tokens.shape)
        types = torch.zeros_like(tokens) if token_types is None else token_types
        x = self.type_tap(self.embed(tokens) + self.type_embed(types))
        places = torch.arange(length, device=tokens.device)
        x = self.position_tap(x + self.position_embed(places))
        x = self.dropout(self.embed_norm(x))
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None]
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, token_types: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V).

        Args:
            tokens: (B, N).
            mask: (B, N), True = a real token; padding is never attended to.
            token_types: (B, N), 0 unless given.

        Raises:
            ValueError: more tokens than positions, or a mask of another shape.
        """
        x = self.features(tokens, mask=mask, token_types=token_types)
        x = self.head_norm(self.act(self.head_dense(x)))
        return F.linear(x, self.embed.weight, self.head_bias)

    def key_map(self) -> KeyMap:
        """Names of Hugging Face's BertForMaskedLM; the tied decoder may be left out."""
        ours, theirs = "layers.{}.", "bert.encoder.layer.{}."
        pairs = [
            ("embed_norm", "bert.embeddings.LayerNorm"),
            ("head_dense", "cls.predictions.transform.dense"),
            ("head_norm", "cls.predictions.transform.LayerNorm"),
            (f"{ours}attention.out_proj", f"{theirs}attention.output.dense"),
            (f"{ours}attention_norm", f"{theirs}attention.output.LayerNorm"),
            (f"{ours}fc1", f"{theirs}intermediate.dense"),
            (f"{ours}fc2", f"{theirs}output.dense"),
            (f"{ours}mlp_norm", f"{theirs}output.LayerNorm"),
        ]
        pairs += [
            (f"{ours}attention.{a}_proj", f"{theirs}attention.self.{b}")
            for a, b in (("q", "query"), ("k", "key"), ("v", "value"))
        ]
        entries = [rename(f"{a}.{k}", f"{b}.{k}") for a, b in pairs for k in ("weight", "bias")]
        first = self.layers[0] if len(self.layers) else None
        if isinstance(first, _Layer) and first.attention.gate is not None:
            gate = first.attention.gate
            entries += gate.entries(f"{ours}attention.gate", f"{theirs}attention.self.alpha")
        table = "bert.embeddings.{}_embeddings.weight"
        return KeyMap(
            rename("embed.weight", table.format("word")),
            rename("position_embed.weight", table.format("position")),
            rename("type_embed.weight", table.format("token_type")),
            *entries,
            rename("head_bias", "cls.predictions.bias"),
            _tied("embed.weight", "cls.predictions.decoder.weight"),
            _tied("head_bias", "cls.predictions.decoder.bias"),
        )


def _tied(ours: str, official: str) -> Entry:
    return Entry((ours,), (official,), is_tied=True, optional=True)


_GATES: dict[str, dict[str, Any]] = {
    "gated_linear": {"gate": "per_token", "gate_init": 0.5},
    "gated_mlp": {"gate": "per_token", "gate_net": "mlp"},
    "gated_mlp2": {"gate": "per_token", "gate_net": "mlp2"},
    "gated_allfeat": {"gate": "per_token", "gate_net": "all_features"},
    "gated_constant": {"gate": "constant"},
    "clipped": {"gamma": -0.025, "max_length": 128},
    "vanilla": {},
}

register_variants(
    QuantizableBERT,
    "quantizable",
    {
        f"bert_base_{name}": (QuantizableBERTConfig(**options), ())
        for name, options in _GATES.items()
    },
)
