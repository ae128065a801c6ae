"""The TransNormer encoder: masked language model and classifier, in RoBERTa's frame (2210.10340).

B batch, N length, C embed_dim, V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, constant, read_weights, rename
from manyheads.layers.norms import simple_rms_norm
from manyheads.layers.ragged import check_mask
from manyheads.models.base import Model, register_variants
from manyheads.models.language.transnormer_blocks import (
    TransNormerBlock,
    TransNormerConfig,
    block_entries,
    fairseq_places,
    fairseq_sinusoidal,
)

__all__ = ["TransNormerEncoder", "TransNormerEncoderConfig"]

_HEADS = ("mlm", "classify", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransNormerEncoderConfig(TransNormerConfig):
    """Sizes and options of the encoder, beside those of both models.

    Attributes:
        max_positions: rows of the learned positions; longer input raises.
        learned_positions: False: sinusoidal positions, of any length.
        embedding_norm: LayerNorm on the embeddings.
        scale_embedding: multiply them by sqrt(C).
        pre_norm: norm before each branch and once at the end, instead of after each sum.
        head: "mlm" (logits of every token), "classify" (one row a sequence) or "none".
        num_classes: K, for "classify".
        pooling: the "first" token of each row, or the "mean" of its real tokens.
    """

    vocab_size: int = 50265
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    attention_dropout: float = 0.1
    max_positions: int = 512
    learned_positions: bool = True
    embedding_norm: bool = True
    scale_embedding: bool = False
    pre_norm: bool = False
    head: Literal["mlm", "classify", "none"] = "mlm"
    num_classes: int | None = None
    pooling: Literal["first", "mean"] = "first"

    def __post_init__(self) -> None:
        super(TransNormerEncoderConfig, self).__post_init__()
        if self.head not in _HEADS:
            raise ValueError(f"head {self.head!r} must be one of {', '.join(_HEADS)}")
        if self.pooling not in ("first", "mean"):
            raise ValueError(f"pooling {self.pooling!r} must be 'first' or 'mean'")
        if (self.head == "classify") != (self.num_classes is not None):
            raise ValueError(
                f"head {self.head!r} with num_classes {self.num_classes}: 'classify' needs "
                "num_classes, the other heads have none"
            )


class _MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, then the tied embedding matrix and a bias of its own."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(x))), weight, self.bias)


class _ClassifyHead(nn.Module):
    """Dropout, Linear, tanh, dropout, Linear."""

    def __init__(self, dim: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, num_classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class TransNormerEncoder(Model):
    """Bidirectional encoder with linear cost. Needs training.

    Example:
        >>> config = TransNormerEncoderConfig(vocab_size=50, embed_dim=48, num_layers=2)
        >>> TransNormerEncoder(config)(torch.randint(2, 50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = TransNormerEncoderConfig
    config: TransNormerEncoderConfig

    def __init__(self, config: TransNormerEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim, padding_idx=c.padding_idx)
        self.positions: nn.Embedding | None = None
        if c.learned_positions:
            rows = c.max_positions + c.padding_idx + 1
            self.positions = nn.Embedding(rows, c.embed_dim, padding_idx=c.padding_idx)
        self.embed_norm = nn.LayerNorm(c.embed_dim) if c.embedding_norm else None
        self.layers = nn.ModuleList(
            TransNormerBlock(c, name, is_causal=False, pre_norm=c.pre_norm) for name in c.types
        )
        self.dropout = nn.Dropout(c.dropout)
        self.head: nn.Module | None = None
        if c.head == "mlm":
            self.head = _MaskedLMHead(c.embed_dim, c.vocab_size)
        elif c.num_classes is not None:
            self.head = _ClassifyHead(c.embed_dim, c.num_classes, c.dropout)
        for table in (self.embed, self.positions):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
                with torch.no_grad():
                    table.weight[c.padding_idx].zero_()

    def features(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the last layer's output (B, N, C) of tokens (B, N).

        Args:
            tokens: ids below ``vocab_size``.
            mask: (B, N), True = a real token: always respected. Without one, tokens with the
                padding id are read as published: see ``TransNormerConfig.respect_padding``.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.

        Raises:
            ValueError: a sequence longer than ``max_positions``.
        """
        c = self.config
        mask = check_mask(mask, tokens.shape[0], tokens.shape[1])
        if mask is None and c.respect_padding and cu_seqlens is None:
            mask = tokens != c.padding_idx
        places = fairseq_places(tokens, c.padding_idx, mask=mask, cu_seqlens=cu_seqlens)
        x = self.embed(tokens)
        if c.scale_embedding:
            x = x * c.embed_dim**0.5
        if self.positions is None:
            x = x + fairseq_sinusoidal(places, c.embed_dim, c.padding_idx).to(x)
        else:
            if tokens.shape[1] > c.max_positions:
                self._check_positions(places)
            x = x + self.positions(places)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.dropout(x).masked_fill((places == c.padding_idx)[..., None], 0)
        for layer in self.layers:
            x = layer(x, mask, cu_seqlens)
        return simple_rms_norm(x, eps=c.eps) if c.pre_norm else x

    def _check_positions(self, places: Tensor) -> None:
        c, longest = self.config, int(places.max()) - self.config.padding_idx
        if longest > c.max_positions:
            raise ValueError(
                f"length {longest} exceeds max_positions {c.max_positions}: cut the input, or "
                "build the model with larger max_positions or learned_positions=False"
            )

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return, by ``config.head``, logits (B, N, V), logits (B, K) or features (B, N, C).

        Packed sequences are classified to (S, K). Arguments as :meth:`features`.
        """
        x = self.features(tokens, mask=mask, cu_seqlens=cu_seqlens)
        if self.head is None:
            return x
        if self.config.head == "mlm":
            return self.head(x, self.embed.weight)
        return self.head(self._pool(x, tokens, mask, cu_seqlens))

    def _pool(
        self, x: Tensor, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        if cu_seqlens is not None:
            starts = cu_seqlens[:-1]
            if self.config.pooling == "first":
                return x[0, starts]
            sums = F.pad(x[0].cumsum(0), (0, 0, 1, 0))
            count = (cu_seqlens[1:] - starts).clamp_min(1)
            return (sums[cu_seqlens[1:]] - sums[starts]) / count[:, None]
        real = tokens != self.config.padding_idx if mask is None else mask
        if self.config.pooling == "first":
            first = real.long().argmax(1)  # left padding does not move the first token
            return x[torch.arange(x.shape[0], device=x.device), first]
        kept = x.masked_fill(~real[..., None], 0)
        return kept.sum(1) / real.sum(1, keepdim=True).clamp_min(1)

    def with_classifier(
        self, num_classes: int, *, pooling: Literal["first", "mean"] = "first"
    ) -> TransNormerEncoder:
        """Return a classifier with a new head and a copy of everything below it."""
        config = self.config.replace(head="classify", num_classes=num_classes, pooling=pooling)
        model = TransNormerEncoder(config).to(self.embed.weight)
        below = {k: t for k, t in self.state_dict().items() if not k.startswith("head.")}
        model.load_state_dict(below, strict=False)
        return model

    def load_official(self, source: str | PathLike[str] | Mapping[str, Any]) -> Self:
        """Load an official checkpoint, with fairseq's prefix ``encoder.`` or without; strict.

        The masked-LM head of the file is left out where this model has another head.
        """
        weights = read_weights(source)
        if not any(k.startswith("encoder.") for k in weights):
            weights = {f"encoder.{k}": t for k, t in weights.items()}
        if self.config.head != "mlm":
            weights = {k: t for k, t in weights.items() if not k.startswith("encoder.lm_head.")}
        return super().load_official(weights)

    def key_map(self) -> KeyMap:
        """Names of fairseq's RoBERTa around the official sentence encoder."""
        stem, head = "encoder.sentence_encoder.", "encoder.lm_head."
        entries = [
            constant(f"{stem}version", torch.full((1,), 3.0), optional=True),
            rename("embed.weight", f"{stem}embed_tokens.weight"),
            rename("positions.weight", f"{stem}embed_positions.weight"),
            rename("embed_norm.weight", f"{stem}layernorm_embedding.weight"),
            rename("embed_norm.bias", f"{stem}layernorm_embedding.bias"),
            *block_entries(stem),
        ]
        if not self.config.learned_positions:
            zero = torch.zeros(1)
            entries.append(constant(f"{stem}embed_positions._float_tensor", zero, optional=True))
        if self.config.head == "mlm":
            entries += [
                Entry(("embed.weight",), (f"{head}weight",), is_tied=True, optional=True),
                rename("head.bias", f"{head}bias"),
                *(rename(f"head.dense.{k}", f"{head}dense.{k}") for k in ("weight", "bias")),
                *(rename(f"head.norm.{k}", f"{head}layer_norm.{k}") for k in ("weight", "bias")),
            ]
        elif self.config.head == "classify":
            theirs = "classification_heads.sentence_classification_head."
            entries += [
                rename(f"head.{part}.{k}", f"{theirs}{part}.{k}")
                for part in ("dense", "out_proj")
                for k in ("weight", "bias")
            ]
        return KeyMap(*entries)


register_variants(
    TransNormerEncoder,
    "transnormer",
    {
        f"roberta_transnormer_{t}": (TransNormerEncoderConfig(variant=t), (f"roberta_{t}_base",))
        for t in ("t1", "t2")
    },
)
