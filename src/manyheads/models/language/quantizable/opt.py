"""OPT with a clipped softmax or gated heads, for causal language modelling (2306.12929).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from manyheads.attention.softmax.op import SoftmaxState
from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, rename
from manyheads.layers.ragged import check_mask
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState
from manyheads.models.language.quantizable.attention import (
    ActivatedLinear,
    OPTSelfAttention,
    TiedHead,
)
from manyheads.models.language.quantizable.config import QuantizableConfig, read_official

__all__ = ["QuantizableOPT", "QuantizableOPTConfig"]

_OFFSET = 2  # rows of the position table before that of the first token
_NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizableOPTConfig(QuantizableConfig):
    """Sizes of a :class:`QuantizableOPT`, by default those of the paper's 125m.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, mlp_width: sizes.
        word_dim: width of the token table; two matrices lead in and out where it differs.
        max_positions: longest sequence.
        activation: of the MLP.
        pre_norm: norms before each branch and at the end, or behind each branch.
        init_std: of linear and embedding weights.
        dropout, attention_dropout: in training.
        padding_id: the token whose embedding is not trained.
    """

    vocab_size: int = 50272
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    word_dim: int | None = None
    max_positions: int = 512
    activation: str = "relu"
    pre_norm: bool = True
    init_std: float = 0.006
    dropout: float = 0.1
    attention_dropout: float = 0.0
    padding_id: int = 1
    gate_std: float = 0.001

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> QuantizableOPTConfig:
        """Read a Hugging Face config of OPT with the options of the official attention.

        Raises:
            ValueError: a key is unknown, or the position table starts at another row than 2.
        """
        if official.get("position_offset", _OFFSET) != _OFFSET:
            raise ValueError(f"position_offset {official['position_offset']} must be {_OFFSET}")
        return cls.from_dict(read_official(official, _OFFICIAL, _NO_EFFECT))


_OFFICIAL = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "ffn_dim": "mlp_width",
    "word_embed_proj_dim": "word_dim",
    "max_position_embeddings": "max_positions",
    "activation": "activation",
    "activation_function": "activation",
    "do_layer_norm_before": "pre_norm",
    "init_std": "init_std",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "pad_token_id": "padding_id",
}
_NO_EFFECT = (
    "architectures", "bos_token_id", "eos_token_id", "layerdrop", "model_type", "position_offset",
    "use_cache",
)  # fmt: skip


class _Layer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), each sum tapped; or norms behind the sums."""

    def __init__(self, config: QuantizableOPTConfig) -> None:
        super().__init__()
        c = config
        self.pre_norm = c.pre_norm
        self.attention = OPTSelfAttention(c.embed_dim, c.num_heads, c, dropout=c.attention_dropout)
        self.attention_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS)
        self.fc1 = ActivatedLinear(c.embed_dim, c.mlp_width, c.activation)
        self.fc2 = nn.Linear(c.mlp_width, c.embed_dim)
        self.mlp_norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS)
        self.attention_tap, self.mlp_tap = nn.Identity(), nn.Identity()
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        mixed = self.attention(self.attention_norm(x) if self.pre_norm else x, bias)
        return self._rest(x, mixed)

    def update(
        self, x: Tensor, state: SoftmaxState, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        entered = self.attention_norm(x) if self.pre_norm else x
        mixed, state = self.attention.update(entered, state, mask)
        return self._rest(x, mixed), state

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.attention_tap(x + self.dropout(mixed))
        if not self.pre_norm:
            x = self.attention_norm(x)
        hidden = self.fc1(self.mlp_norm(x) if self.pre_norm else x)
        x = self.mlp_tap(x + self.dropout(self.fc2(hidden)))
        return x if self.pre_norm else self.mlp_norm(x)


class QuantizableOPT(CausalLM):
    """OPT whose heads can do nothing without outliers. Needs training.

    Positions are counted among real tokens. Gates that average over tokens ("per_head") look
    ahead: such a model cannot generate.

    Example:
        >>> config = QuantizableOPTConfig(vocab_size=50, embed_dim=32, num_layers=2, num_heads=4,
        ...     mlp_width=64, gate="per_token", gate_init=0.25)
        >>> QuantizableOPT(config)(torch.randint(50, (2, 30))).shape
        torch.Size([2, 30, 50])
    """

    config_class: ClassVar[type[Config]] = QuantizableOPTConfig
    config: QuantizableOPTConfig

    def __init__(self, config: QuantizableOPTConfig) -> None:
        super().__init__()
        self.config = c = config
        words = c.embed_dim if c.word_dim is None else c.word_dim
        self.embed = nn.Embedding(c.vocab_size, words, padding_idx=c.padding_id)
        self.position_embed = nn.Embedding(c.max_positions + _OFFSET, c.embed_dim)
        self.project_in, self.project_out = (
            nn.Linear(a, b, bias=False) if words != c.embed_dim else None
            for a, b in ((words, c.embed_dim), (c.embed_dim, words))
        )
        self.embed_tap, self.head = nn.Identity(), TiedHead()
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.embed_dim, eps=_NORM_EPS) if c.pre_norm else None
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()

    @property
    def _blocks(self) -> list[_Layer]:
        return cast(list[_Layer], list(self.layers))

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, N, V).

        Args:
            tokens: (B, N).
            mask: (B, N), True = a real token, padded on either side.

        Raises:
            ValueError: more tokens than positions, or a mask of another shape.
        """
        mask = check_mask(mask, *tokens.shape)
        real = torch.ones_like(tokens) if mask is None else mask.long()
        x = self._embed(tokens, real.cumsum(1) * real - 1, tokens.shape[1])
        bias = None if mask is None else _causal_bias(mask, x.dtype)
        for block in self._blocks:
            x = block(x, bias)
        return self._head(x)

    def init_state(self, batch_size: int) -> LMState:
        if self.config.looks_ahead:
            raise ValueError("gate='per_head' averages over later tokens: it has no streaming form")
        states = tuple(block.attention.init_state(batch_size) for block in self._blocks)
        position = torch.zeros(batch_size, dtype=torch.long, device=self.embed.weight.device)
        return LMState(states, position)

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        mask = check_mask(mask, *tokens.shape)
        real = torch.ones_like(tokens) if mask is None else mask.long()
        places = (real.cumsum(1) + state.position[:, None]) * real - 1
        x = self._embed(tokens, places, int(state.position.max()) + tokens.shape[1])
        states = []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.update(x, own, mask)
            states.append(own)
        return self._head(x), LMState(tuple(states), state.position + real.sum(1))

    def _embed(self, tokens: Tensor, places: Tensor, length: int) -> Tensor:
        if length > self.config.max_positions and int(places.max()) >= self.config.max_positions:
            raise ValueError(
                f"length {length} exceeds the {self.config.max_positions} positions of the model: "
                "cut the input, or build it with more max_positions"
            )
        x = self.embed(tokens)
        if self.project_in is not None:
            x = self.project_in(x)
        return self.dropout(self.embed_tap(x + self.position_embed(places + _OFFSET)))

    def _head(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.head(x, self.embed.weight)

    def key_map(self) -> KeyMap:
        """Names of Hugging Face's OPTForCausalLM; the tied head may be left out."""
        ours, theirs = "layers.{}.", "model.decoder.layers.{}."
        pairs = [
            (f"{ours}attention.{n}_proj", f"{theirs}self_attn.{n}_proj")
            for n in ("q", "k", "v", "out")
        ]
        pairs += [
            (f"{ours}attention_norm", f"{theirs}self_attn_layer_norm"),
            (f"{ours}fc1", f"{theirs}fc1"),
            (f"{ours}fc2", f"{theirs}fc2"),
            (f"{ours}mlp_norm", f"{theirs}final_layer_norm"),
        ]
        if self.norm is not None:
            pairs.append(("norm", "model.decoder.final_layer_norm"))
        entries = [rename(f"{a}.{k}", f"{b}.{k}") for a, b in pairs for k in ("weight", "bias")]
        if self.project_in is not None:
            names = ("project_in", "project_out")
            entries += [rename(f"{n}.weight", f"model.decoder.{n}.weight") for n in names]
        if self._blocks and (gate := self._blocks[0].attention.gate) is not None:
            entries += gate.entries(f"{ours}attention.gate", f"{theirs}self_attn.alpha")
        return KeyMap(
            rename("embed.weight", "model.decoder.embed_tokens.weight"),
            rename("position_embed.weight", "model.decoder.embed_positions.weight"),
            *entries,
            Entry(("embed.weight",), ("lm_head.weight",), is_tied=True, optional=True),
        )


def _causal_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return causal mask + padding mask, (B, 1, N, N), each the least finite number where closed.

    Their sum may overflow to −inf: attention takes the maximum with the least finite number.
    """
    least = torch.finfo(dtype).min
    zeros = torch.zeros(mask.shape[1], mask.shape[1], dtype=dtype, device=mask.device)
    later = torch.ones_like(zeros, dtype=torch.bool).triu(1)
    padded = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)
    return zeros.masked_fill(later, least) + padded[:, None, None]


_SIZES: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {
        "embed_dim": 1024, "num_layers": 24, "num_heads": 16, "mlp_width": 4096,
        "word_dim": 768, "max_positions": 1024,
    },
    "1.3b": {
        "embed_dim": 2048, "num_layers": 24, "num_heads": 32, "mlp_width": 8192,
        "word_dim": 768, "max_positions": 1024,
    },
}  # fmt: skip
_KINDS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "clipped": {"alpha": 12.0, "max_length": 512},
    "gated_linear": {"gate": "per_token", "gate_init": 0.25},
    "gated_mlp": {"gate": "per_token", "gate_net": "mlp"},
    "gated_allfeat": {"gate": "per_token", "gate_net": "all_features"},
}

register_variants(
    QuantizableOPT,
    "quantizable",
    {
        f"opt_{size}_{kind}": (QuantizableOPTConfig(**sizes, **options), ())
        for size, sizes in _SIZES.items()
        for kind, options in _KINDS.items()
    },
)
