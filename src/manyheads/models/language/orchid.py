"""Orchid encoders of tokens: masked language model and classifier (2402.18508).

The paper publishes its mixing layer and the sizes in millions of parameters alone. Widths, depths
and the gated MLP are a reconstruction that comes to those sizes: 77M beside BERT-base, 254M
beside BERT-large. B batch, N length, C embed_dim, V vocabulary, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from manyheads.attention.orchid import OrchidConfig
from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.keymap import KeyMap
from manyheads.layers.ragged import check_cu_seqlens, check_mask, positions, sequence_ids
from manyheads.models.base import Model, register_variants
from manyheads.models.language.orchid_blocks import OrchidBlock, initialise

__all__ = [
    "OrchidBlock",
    "OrchidEncoder",
    "OrchidEncoderConfig",
    "OrchidForClassification",
    "OrchidForMaskedLM",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class OrchidEncoderConfig(Config):
    """Sizes of the encoders; the defaults are the reconstruction of Orchid-BERT-base.

    Attributes:
        vocab_size, embed_dim, num_layers, mlp_width: sizes.
        mlp_blocks: blocks of the MLP's block-diagonal matrices, 1 for dense ones.
        gated_mlp: act(gate(x)) · up(x) inside the MLP instead of act(up(x)).
        max_length: of positions and of the static filters.
        segments: kinds of tokens with an embedding of their own (0: none).
        padding_id: this token is padding where no mask is given (None: no token is).
        num_classes: of the classifier.
        pool: the classifier reads the "first" real token or the "mean" of them.
        activation, dropout, drop_path, norm_eps, init_std: as named; drop_path rises to this rate
            at the last block.
        mixer: further options of :class:`manyheads.attention.OrchidConfig`.
    """

    vocab_size: int = 30522
    embed_dim: int = 768
    num_layers: int = 12
    mlp_width: int = 3072
    mlp_blocks: int = 4
    gated_mlp: bool = True
    max_length: int = 128
    segments: int = 2
    padding_id: int | None = 0
    num_classes: int = 2
    pool: Literal["first", "mean"] = "first"
    activation: str = "gelu"
    dropout: float = 0.1
    drop_path: float = 0.0
    norm_eps: float = 1e-12
    init_std: float = 0.02
    mixer: dict[str, Any] = field(default_factory=lambda: {"filter_width": 128})

    def __post_init__(self) -> None:
        if self.pool not in ("first", "mean"):
            raise ValueError(f"pool {self.pool!r} must be 'first' or 'mean'")
        if self.padding_id is not None and not 0 <= self.padding_id < self.vocab_size:
            raise ValueError(
                f"padding_id {self.padding_id} is outside vocabulary {self.vocab_size}"
            )
        self.mixer_config()

    def mixer_config(self) -> OrchidConfig:
        """Return the config of each mixer."""
        sizes = {"embed_dim": self.embed_dim, "max_length": self.max_length}
        return OrchidConfig.from_dict(sizes | self.mixer)


class OrchidEncoder(Model):
    """Bidirectional encoder of tokens, without a head. Looks ahead; needs training.

    Example:
        >>> config = OrchidEncoderConfig(vocab_size=50, embed_dim=32, num_layers=2, mlp_width=64)
        >>> OrchidEncoder(config)(torch.randint(1, 50, (2, 30))).shape
        torch.Size([2, 30, 32])
    """

    config_class: ClassVar[type[Config]] = OrchidEncoderConfig
    config: OrchidEncoderConfig

    def __init__(self, config: OrchidEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.position_embed = nn.Embedding(c.max_length, c.embed_dim)
        self.segment_embed = nn.Embedding(c.segments, c.embed_dim) if c.segments else None
        self.embed_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        last = max(1, c.num_layers - 1)
        self.layers = nn.ModuleList(
            OrchidBlock(
                c.mixer_config(),
                c.mlp_width,
                mlp_blocks=c.mlp_blocks,
                gated_mlp=c.gated_mlp,
                activation=c.activation,
                dropout=c.dropout,
                drop_path=c.drop_path * i / last,
                norm_eps=c.norm_eps,
            )
            for i in range(c.num_layers)
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        initialise(self, c.init_std)

    def features(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the last layer's output (B, N, C).

        Args:
            tokens: (B, N); without ``mask``, those equal to ``padding_id`` are padding.
            segments: (B, N) kinds of tokens, 0 if None.
            mask: (B, N), True = a real token; rows are computed one length at a time.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.

        Raises:
            ValueError: longer than ``max_length``, or segments that the model does not have.
        """
        c, (batch, length) = self.config, tokens.shape
        mask = check_mask(mask, batch, length)
        if mask is None and cu_seqlens is None and c.padding_id is not None:
            real = tokens != c.padding_id
            mask = None if bool(real.all()) else real
        if cu_seqlens is not None:
            borders = check_cu_seqlens(cu_seqlens, batch, length)
            longest = max(b - a for a, b in pairwise(borders))
            places = torch.arange(length, device=tokens.device)
            places = places - cu_seqlens[sequence_ids(cu_seqlens, length)]
        else:
            longest = length if mask is None else int(mask.sum(1).max())
            places = positions(mask, length, device=tokens.device)
        if longest > c.max_length:
            raise ValueError(
                f"length {longest} exceeds max_length {c.max_length}: build the model with a "
                "larger one"
            )
        x = self.embed(tokens) + self.position_embed(places.clamp_max(c.max_length - 1))
        if self.segment_embed is not None:
            x = x + self.segment_embed(torch.zeros_like(tokens) if segments is None else segments)
        elif segments is not None:
            raise ValueError("segments are given, the model has segments=0")
        x = self.dropout(self.embed_norm(x))
        for block in cast(list[OrchidBlock], list(self.layers)):
            x = block(x, mask=mask, cu_seqlens=cu_seqlens)
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return features (B, N, C); arguments as :meth:`features`."""
        return self.features(tokens, segments=segments, mask=mask, cu_seqlens=cu_seqlens)

    def key_map(self) -> KeyMap:
        """Only the mixing layer was published."""
        raise ValueError(
            f"{type(self).__name__} has no official checkpoints, only its mixers have official "
            "names (OrchidAttention.load_official): use save() and load()"
        )


class OrchidForMaskedLM(OrchidEncoder):
    """Encoder with a head over the vocabulary, whose matrix is the embedding. Needs training.

    Example:
        >>> config = OrchidEncoderConfig(vocab_size=50, embed_dim=32, num_layers=2, mlp_width=64)
        >>> OrchidForMaskedLM(config)(torch.randint(1, 50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    def __init__(self, config: OrchidEncoderConfig) -> None:
        super().__init__(config)
        c = config
        self.head_dense = nn.Linear(c.embed_dim, c.embed_dim)
        self.head_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head_bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.act = activation(c.activation)
        initialise(self.head_dense, c.init_std)

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, N, V); arguments as :meth:`OrchidEncoder.features`."""
        x = self.features(tokens, segments=segments, mask=mask, cu_seqlens=cu_seqlens)
        x = self.head_norm(self.act(self.head_dense(x)))
        return nn.functional.linear(x, self.embed.weight, self.head_bias)


class OrchidForClassification(OrchidEncoder):
    """Encoder with a classifier on the first token or the mean, as for GLUE. Needs training.

    Example:
        >>> config = OrchidEncoderConfig(vocab_size=50, embed_dim=32, num_layers=2, num_classes=3)
        >>> OrchidForClassification(config)(torch.randint(1, 50, (2, 30))).shape
        torch.Size([2, 3])
    """

    def __init__(self, config: OrchidEncoderConfig) -> None:
        super().__init__(config)
        self.pooler = nn.Linear(config.embed_dim, config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.num_classes)
        for part in (self.pooler, self.head):
            initialise(part, config.init_std)

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, K), or (S, K) of packed sequences; arguments as ``features``."""
        x = self.features(tokens, segments=segments, mask=mask, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            pooled = self._pool_packed(x[0], cu_seqlens)
        else:
            if mask is None and self.config.padding_id is not None:
                mask = tokens != self.config.padding_id
            pooled = self._pool(x, mask)
        return self.head(self.dropout(torch.tanh(self.pooler(pooled))))

    def _pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            return x[:, 0] if self.config.pool == "first" else x.mean(1)
        mask = mask.bool()
        if self.config.pool == "first":
            return x[torch.arange(x.shape[0], device=x.device), mask.int().argmax(1)]
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def _pool_packed(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        if self.config.pool == "first":
            return x[cu_seqlens[:-1]]
        ids = sequence_ids(cu_seqlens, x.shape[0])
        total = x.new_zeros(len(cu_seqlens) - 1, x.shape[1]).index_add(0, ids, x)
        return total / cu_seqlens.diff().clamp_min(1)[:, None]


register_variants(
    OrchidForMaskedLM,
    "orchid",
    {
        "orchid_bert_base": (OrchidEncoderConfig(), ("orchid-bert-base",)),
        "orchid_bert_large": (
            OrchidEncoderConfig(embed_dim=1536, mlp_width=6144),
            ("orchid-bert-large",),
        ),
    },
)
