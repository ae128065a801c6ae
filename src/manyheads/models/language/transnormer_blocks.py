"""What the TransNormer language model and encoder share (Qin et al., 2210.10340).

B batch, N length, C embed_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.attention.diag import DiagAttention, DiagConfig
from manyheads.attention.norm import NormAttention, NormConfig
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.activations import activation
from manyheads.layers.keymap import Entry, rename
from manyheads.layers.mlp import GatedMLP
from manyheads.layers.norms import simple_rms_norm
from manyheads.layers.ragged import check_cu_seqlens, positions, sequence_ids

__all__ = [
    "TransNormerBlock",
    "TransNormerConfig",
    "block_entries",
    "drop_prefix",
    "fairseq_places",
    "fairseq_sinusoidal",
    "half_local",
]


def half_local(num_layers: int) -> tuple[str, ...]:
    """Return the published order: block-local attention in the first half, linear after it."""
    local = num_layers // 2
    return ("diag",) * local + ("norm",) * (num_layers - local)


@dataclass(frozen=True, kw_only=True, slots=True)
class TransNormerConfig(Config):
    """Sizes and options of both models.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads: sizes.
        variant: "t1" (relu and norm in blocks, elu features) or "t2" (softmax in blocks, 1 + elu).
        layer_types: "diag" or "norm" for each layer (None: the first half is "diag").
        block_size: of the "diag" layers.
        mlp_width: hidden width of the gated MLP (None: 8/3 of embed_dim, rounded down).
        activation: of its gate. The published models have "identity": their code asks for
            "swish", which its table does not know. "silu" is what the paper means.
        dropout: on the embeddings and on both branches of a block.
        attention_dropout: on the weights of the "diag" layers.
        eps: of all norms without parameters.
        padding_idx: the token id of padding.
        respect_padding: without a mask, tokens with id ``padding_idx`` are left out of attention.
            Default False, as published: they take part (though not in the positions). A mask that
            is given is always respected.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    variant: Literal["t1", "t2"] = "t1"
    layer_types: tuple[str, ...] | None = None
    block_size: int = 64
    mlp_width: int | None = None
    activation: str = "identity"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    eps: float = 1e-8
    padding_idx: int = 1
    respect_padding: bool = False

    def __post_init__(self) -> None:
        activation(self.activation)
        if not 0 <= self.padding_idx < self.vocab_size:
            raise ValueError(
                f"padding_idx {self.padding_idx} is no token of a vocabulary of {self.vocab_size}"
            )
        for name in self.types:
            if name not in ("diag", "norm"):
                raise unknown_name("layer type", name, ("diag", "norm"))
        if len(self.types) != self.num_layers:
            raise ValueError(
                f"layer_types names {len(self.types)} layers, num_layers is {self.num_layers}"
            )

    @property
    def types(self) -> tuple[str, ...]:
        return half_local(self.num_layers) if self.layer_types is None else self.layer_types

    @property
    def width(self) -> int:
        return 8 * self.embed_dim // 3 if self.mlp_width is None else self.mlp_width


class TransNormerBlock(nn.Module):
    """Attention and gated MLP, each with a residual and SimpleRMSNorm before or after it."""

    def __init__(
        self, config: TransNormerConfig, layer_type: str, *, is_causal: bool, pre_norm: bool
    ) -> None:
        super().__init__()
        c, self.pre_norm = config, pre_norm
        self.eps = c.eps
        common: dict[str, Any] = {
            "embed_dim": c.embed_dim,
            "num_heads": c.num_heads,
            "is_causal": is_causal,
            "variant": c.variant,
            "eps": c.eps,
        }
        self.mixer: NormAttention | DiagAttention
        if layer_type == "norm":
            self.mixer = NormAttention(NormConfig(**common))
        else:
            self.mixer = DiagAttention(
                DiagConfig(
                    **common,
                    block_size=c.block_size,
                    attention_dropout=c.attention_dropout,
                    pad_keys=True,
                )
            )
        self.mlp = GatedMLP(c.embed_dim, c.width, activation_name=c.activation, bias=True)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        mixed = self.mixer(self._before(x), mask=mask, cu_seqlens=cu_seqlens)
        return self._rest(x, mixed)

    def update(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.update(self._before(x), state, mask=mask)
        return self._rest(x, mixed), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self._before(x), state)
        return self._rest(x, mixed), state

    def _before(self, x: Tensor) -> Tensor:
        return simple_rms_norm(x, eps=self.eps) if self.pre_norm else x

    def _after(self, x: Tensor) -> Tensor:
        return x if self.pre_norm else simple_rms_norm(x, eps=self.eps)

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self._after(x + self.dropout(mixed))
        return self._after(x + self.dropout(self.mlp(self._before(x))))


def fairseq_places(
    tokens: Tensor,
    padding_idx: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """Return position numbers (B, N) as fairseq counts them.

    Real tokens count from ``padding_idx`` + 1; padding, which is what ``mask`` says or, without
    one, every token with that id, stands at ``padding_idx``. Packed sequences start afresh, and
    all their tokens are real.

    Args:
        before: (B,) real tokens of each row that were read already.
    """
    length = tokens.shape[1]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, tokens.shape[0], length)
        ids = sequence_ids(cu_seqlens, length)
        inside = torch.arange(length, device=tokens.device) - cu_seqlens[ids]
        return (inside + padding_idx + 1).expand(tokens.shape[0], -1)
    real = tokens != padding_idx if mask is None else mask
    places = positions(real, length, device=tokens.device)
    if before is not None:
        places = places + before[:, None]
    return (places + padding_idx + 1).masked_fill(~real, padding_idx)


def fairseq_sinusoidal(places: Tensor, dim: int, padding_idx: int) -> Tensor:
    """Return sines (first half) and cosines of positions, zeros at ``padding_idx``: (B, N, C).

    The frequencies run from 1 to exactly 1 / 10000, over C / 2 - 1 steps.
    """
    half = dim // 2
    index = torch.arange(half, device=places.device, dtype=torch.float32)
    frequency = torch.exp(index * -(math.log(10000) / max(half - 1, 1)))
    angle = places.float()[..., None] * frequency
    parts = [angle.sin(), angle.cos()]
    if dim % 2:
        parts.append(torch.zeros_like(angle[..., :1]))
    return torch.cat(parts, -1).masked_fill((places == padding_idx)[..., None], 0)


def block_entries(prefix: str) -> list[Entry]:
    """Return the official names of all layers, ``{prefix}layers.N.``."""
    kinds = ("weight", "bias")
    pairs = [
        *(
            (f"mixer.{p}_proj.{k}", f"self_attn.{p}_proj.{k}")
            for p in ("q", "k", "v", "out")
            for k in kinds
        ),
        ("mixer.lrpe.theta", "self_attn.urpe.theta"),
        ("mixer.lrpe.v", "self_attn.urpe.v"),
        *(
            (f"mlp.{ours}_proj.{k}", f"glu.{theirs}.{k}")
            for ours, theirs in (("gate", "l1"), ("up", "l2"), ("down", "l3"))
            for k in kinds
        ),
    ]
    return [rename(f"layers.{{}}.{a}", f"{prefix}layers.{{}}.{b}") for a, b in pairs]


def drop_prefix(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights without a prefix that all names have."""
    if weights and all(name.startswith(prefix) for name in weights):
        return {name.removeprefix(prefix): t for name, t in weights.items()}
    return weights
