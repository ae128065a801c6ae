"""BERT's encoder under its official names, and the sizes that MiniLM published (2002.10957).

B batch, N length, C hidden size, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, read_weights, rename
from manyheads.layers.ragged import check_mask
from manyheads.models.base import Model, register_variants

__all__ = ["BertConfig", "BertEncoder", "BertOutput"]

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BertConfig(Config):
    """Sizes of a :class:`BertEncoder`, by the names of an official ``config.json``.

    Attributes:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
        max_position_embeddings, type_vocab_size, layer_norm_eps, initializer_range: as named.
        hidden_act: "gelu", "gelu_new", "relu" or "silu".
        hidden_dropout_prob, attention_probs_dropout_prob: while training.
        add_pooler: the dense layer and tanh on the first token.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    add_pooler: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}: give another of the two"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is none of {', '.join(_ACTIVATIONS)}")

    @classmethod
    def from_official(cls, values: Mapping[str, Any]) -> BertConfig:
        """Read a ``config.json`` of a BERT; keys that change nothing here are passed over.

        Raises:
            ValueError: another architecture, relative positions, or a decoder.
        """
        kind = values.get("model_type", "bert")
        if kind != "bert":
            raise ValueError(f"model_type {kind!r} is no BERT: this class has BERT's layers alone")
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError("position_embedding_type must be 'absolute': no other is built here")
        if values.get("is_decoder", False):
            raise ValueError("is_decoder is True: this class is an encoder")
        known = cls.__dataclass_fields__
        return cls.from_dict({k: v for k, v in values.items() if k in known})

    def to_official(self) -> dict[str, Any]:
        """Return a ``config.json`` that transformers' ``AutoModel`` reads."""
        return self.to_dict() | {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "pad_token_id": 0,
        }


class BertOutput(NamedTuple):
    """What :class:`BertEncoder` returns.

    Attributes:
        features: (B, N, C) of the last layer; None where the rest was not run.
        query, key, value: (B, H, N, D) of the last layer, before the scale; None unless asked for.
    """

    features: Tensor | None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


class _SelfAttention(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = c.num_attention_heads, c.attention_probs_dropout_prob
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.query, self.key, self.value = (
            nn.Linear(c.hidden_size, c.hidden_size) for _ in range(3)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, C) to three of (B, H, N, D)."""
        projections = (self.query, self.key, self.value)
        q, k, v = (split_heads(p(x), self.num_heads) for p in projections)
        return q, k, v

    def mix(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        return merge_heads(mixed)


class _Residual(nn.Module):
    """norm(residual + dropout(dense(x)))."""

    def __init__(self, width: int, c: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.dropout = nn.Dropout(c.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class _Layer(nn.Module):
    def __init__(self, c: BertConfig) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": _SelfAttention(c), "output": _Residual(c.hidden_size, c)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.intermediate_size)})
        self.output = _Residual(c.intermediate_size, c)
        self.act = activation(_ACTIVATIONS[c.hidden_act])

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cast(_SelfAttention, self.attention["self"]).project(x)

    def finish(self, x: Tensor, qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor | None) -> Tensor:
        mixed = cast(_SelfAttention, self.attention["self"]).mix(*qkv, bias)
        x = self.attention["output"](mixed, x)
        return self.output(self.act(self.intermediate["dense"](x)), x)


class BertEncoder(Model):
    """BERT: post-norm encoder with learnt positions. Looks ahead; needs training or weights.

    Parameters have the names of ``transformers.BertModel``. "BERT: Pre-training of Deep
    Bidirectional Transformers for Language Understanding", 1810.04805.

    Example:
        >>> config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2,
        ...                     num_attention_heads=4, intermediate_size=48)
        >>> BertEncoder(config)(torch.randint(1, 50, (2, 7))).features.shape
        torch.Size([2, 7, 24])
    """

    config_class: ClassVar[type[Config]] = BertConfig
    config: BertConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = c = config
        norm = nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=0),
                "position_embeddings": nn.Embedding(c.max_position_embeddings, c.hidden_size),
                "token_type_embeddings": nn.Embedding(c.type_vocab_size, c.hidden_size),
                "LayerNorm": norm,
            }
        )
        self.dropout = nn.Dropout(c.hidden_dropout_prob)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(_Layer(c) for _ in range(c.num_hidden_layers))}
        )
        self.pooler = (
            nn.ModuleDict({"dense": nn.Linear(c.hidden_size, c.hidden_size)})
            if c.add_pooler
            else None
        )
        self._initialise(c.initializer_range)

    def _initialise(self, std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)
                elif module.padding_idx is not None:
                    with torch.no_grad():
                        module.weight[module.padding_idx].zero_()

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        output: Literal["features", "qkv", "both"] = "features",
    ) -> BertOutput:
        """Encode tokens.

        Args:
            tokens: (B, N) ids.
            segments: (B, N) kinds of tokens, 0 if None.
            mask: (B, N), True = a real token. Positions count padding too, as officially.
            output: "qkv" stops at the last layer's projections, "both" returns them beside the
                features.

        Raises:
            ValueError: longer than ``max_position_embeddings``, a mask of another shape, or an
                unknown ``output``.
        """
        if output not in ("features", "qkv", "both"):
            raise ValueError(f"output {output!r} must be 'features', 'qkv' or 'both'")
        batch, length = tokens.shape
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"length {length} exceeds max_position_embeddings "
                f"{self.config.max_position_embeddings}: cut the sequences"
            )
        mask = check_mask(mask, batch, length)
        bias = None if mask is None or bool(mask.all()) else mask[:, None, None]
        if bias is not None and mask is not None:
            # A row without a real token attends to itself instead of to nothing, which is NaN.
            bias = bias | ~mask.any(1)[:, None, None, None]
        table = self.embeddings
        x = table["word_embeddings"](tokens)
        x = x + cast(nn.Embedding, table["position_embeddings"]).weight[:length]
        x = x + table["token_type_embeddings"](
            torch.zeros_like(tokens) if segments is None else segments
        )
        x = self.dropout(table["LayerNorm"](x))
        layers = list(cast(nn.ModuleList, self.encoder["layer"]))
        for place, layer in enumerate(cast(list[_Layer], layers)):
            qkv = layer.project(x)
            last = place + 1 == len(layers)
            if last and output == "qkv":
                return BertOutput(None, *qkv)
            x = layer.finish(x, qkv, bias)
        return BertOutput(x, *qkv) if output == "both" else BertOutput(x)

    def pooled(self, features: Tensor) -> Tensor:
        """Return tanh(dense(first token)), (B, C), of features (B, N, C).

        Raises:
            ValueError: the model was built without a pooler.
        """
        if self.pooler is None:
            raise ValueError("the model has no pooler: build it with add_pooler=True")
        return torch.tanh(self.pooler["dense"](features[:, 0]))

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load weights of a BERT, strictly: names may start with ``bert.``; returns self.

        A masked-language-model head (``cls.``) beside those is left out.

        Raises:
            ValueError: a key is missing, left over or of another shape.
        """
        read = read_weights(source)
        if any(k.startswith("bert.") for k in read):
            read = {k.removeprefix("bert."): t for k, t in read.items() if not k.startswith("cls.")}
        # A table of 0, 1, 2, ... that old files hold.
        read.pop("embeddings.position_ids", None)
        return super().load_official(read)

    def key_map(self) -> KeyMap:
        """Official names are ours."""
        layer = (
            "attention.self.query", "attention.self.key", "attention.self.value",
            "attention.output.dense", "attention.output.LayerNorm", "intermediate.dense",
            "output.dense", "output.LayerNorm",
        )  # fmt: skip
        pairs = [f"encoder.layer.{{}}.{n}" for n in layer] + [
            "embeddings.LayerNorm",
            "pooler.dense",
        ]
        names = [f"{n}.{kind}" for n in pairs for kind in ("weight", "bias")]
        names += [f"embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")]
        return KeyMap(*(rename(n, n) for n in names))


def _mini(layers: int, hidden: int, **options: Any) -> BertConfig:
    return BertConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, **options
    )


register_variants(
    BertEncoder,
    "minilm",
    {
        "minilm_l12_h384_uncased": (
            _mini(12, 384),
            ("l12_h384_uncased", "MiniLM-L12-H384-uncased"),
        ),
        "minilm_l6_h384_uncased": (_mini(6, 384), ("l6_h384_uncased", "MiniLM-L6-H384-uncased")),
        "minilm_l6_h768_uncased": (_mini(6, 768), ("l6_h768_uncased", "MiniLM-L6-H768-uncased")),
        "minilm_multilingual_l12_h384": (
            _mini(12, 384, vocab_size=250037),
            ("multilingual_l12_h384", "Multilingual-MiniLM-L12-H384"),
        ),
    },
)
