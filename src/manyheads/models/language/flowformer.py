"""Flowformer as a language model in the layout of GPT: causal flow attention (2202.06258).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from manyheads.attention.flow import FlowAttention, FlowConfig, FlowState
from manyheads.config import Config
from manyheads.errors import nearest, unknown_name
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap, rename, tied
from manyheads.layers.mlp import MLP
from manyheads.layers.ragged import check_cu_seqlens, check_mask, positions, sequence_ids
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState

__all__ = ["FlowformerBlock", "FlowformerGPT", "FlowformerGPTConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowformerGPTConfig(Config):
    """Sizes of the model; the defaults are those of ``flowformer_gpt2``.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads: sizes.
        block_size: longest sequence that has learned positions.
        clamp: bound of the conserved source, see :func:`manyheads.attention.flow`.
        tie_embeddings: whether the head is the embedding (official: no).
        dropout: on the embedded input and inside the MLPs while training.
        attention_dropout: on the output of each attention layer while training.
        init_std: of linear and embedding weights.
    """

    vocab_size: int = 50257
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    block_size: int = 1024
    clamp: float | None = 1.0
    tie_embeddings: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.05
    init_std: float = 0.02

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> FlowformerGPTConfig:
        """Read the options of the official class: a ``model_type``, or sizes, or both.

        Raises:
            ValueError: an unknown key or model type; the nearest is named.
        """
        values: dict[str, Any] = {}
        for key, value in official.items():
            if key in _OFFICIAL:
                values[_OFFICIAL[key]] = value
            elif key not in ("model_type", "attn_pdrop", "resid_pdrop"):
                known = [*_OFFICIAL, "model_type", "attn_pdrop", "resid_pdrop"]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        kind = official.get("model_type")
        if kind is None:
            return cls.from_dict(values)
        if kind not in _TYPES:
            raise unknown_name("model_type", kind, _TYPES)
        return _TYPES[kind].replace(**values)


_OFFICIAL = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "embed_dim",
    "vocab_size": "vocab_size",
    "block_size": "block_size",
    "embd_pdrop": "dropout",
}
_TYPES = {
    "flowformer-gpt2": FlowformerGPTConfig(),
    "flowformer-gpt-mini": FlowformerGPTConfig(embed_dim=192, num_layers=6, num_heads=6),
    "flowformer-gpt-nano": FlowformerGPTConfig(embed_dim=48, num_layers=3, num_heads=3),
}


class FlowformerBlock(nn.Module):
    """x += flow(norm(x)); x += mlp(norm(x)), with LayerNorms and a GELU MLP."""

    def __init__(
        self, config: FlowConfig, *, mlp_ratio: float, activation_name: str, dropout: float
    ) -> None:
        super().__init__()
        dim = config.embed_dim
        self.mixer_norm = nn.LayerNorm(dim)
        self.mixer = FlowAttention(config)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), activation_name=activation_name, dropout=dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), mask=mask, cu_seqlens=cu_seqlens)
        return x + self.mlp(self.mlp_norm(x))

    def update(self, x: Tensor, state: FlowState, mask: Tensor | None) -> tuple[Tensor, FlowState]:
        mixed, state = self.mixer.update(self.mixer_norm(x), state, mask=mask)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class FlowformerGPT(CausalLM):
    """Language model of causal flow attention; constant memory while it generates.

    Learned positions bound the length: at most ``block_size`` tokens, prompt included.

    Example:
        >>> config = FlowformerGPTConfig(vocab_size=50, embed_dim=48, num_layers=2, num_heads=4)
        >>> FlowformerGPT(config)(torch.randint(50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = FlowformerGPTConfig
    config: FlowformerGPTConfig

    def __init__(self, config: FlowformerGPTConfig) -> None:
        super().__init__()
        self.config = c = config
        attention = FlowConfig(
            embed_dim=c.embed_dim, num_heads=c.num_heads, clamp=c.clamp, dropout=c.attention_dropout
        )
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.positions = nn.Embedding(c.block_size, c.embed_dim)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(
            FlowformerBlock(
                attention, mlp_ratio=4, activation_name="gelu_tanh", dropout=c.dropout
            )
            for _ in range(c.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c.embed_dim)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        self.apply(self._init)
        for layer in self.layers:
            # The official code re-draws what it names c_proj: the MLP's output, not attention's.
            std = c.init_std / (2 * c.num_layers) ** 0.5
            nn.init.normal_(layer.get_parameter("mlp.fc2.weight"), std=std)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); ``mask`` and ``cu_seqlens`` as in the layers.

        Raises:
            ValueError: a sequence is longer than ``block_size``.
        """
        batch, length = tokens.shape
        mask = check_mask(mask, batch, length)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, length)
            ids = sequence_ids(cu_seqlens, length)
            places = torch.arange(length, device=tokens.device) - cu_seqlens[ids]
        else:
            places = positions(mask, length, device=tokens.device)
        x = self._embed(tokens, places, mask)
        for layer in self.layers:
            x = layer(x, mask, cu_seqlens)
        return self.head(self.norm(x))

    def init_state(self, batch_size: int) -> LMState:
        return LMState(tuple(layer.mixer.init_state(batch_size) for layer in self._blocks()))

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        mask = check_mask(mask, *tokens.shape)
        before = state.layers[0].length
        places = before[:, None] + positions(mask, tokens.shape[1], device=tokens.device)
        self._check_length(places, mask)
        x, states = self._embed(tokens, places, mask), []
        for layer, own in zip(self._blocks(), state.layers, strict=True):
            x, own = layer.update(x, own, mask)
            states.append(own)
        return self.head(self.norm(x)), LMState(tuple(states))

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        places = state.layers[0].length
        self._check_length(places, None)
        x, states = self._embed(tokens, places, None), []
        for layer, own in zip(self._blocks(), state.layers, strict=True):
            x, own = layer.step(x, own)
            states.append(own)
        return self.head(self.norm(x)), LMState(tuple(states))

    def generate(
        self,
        prompt: Tensor,
        *,
        max_new_tokens: int,
        mask: Tensor | None = None,
        **options: Any,
    ) -> Iterator[Tensor]:
        """As :meth:`CausalLM.generate`; the positions for the whole answer have to be there.

        Raises:
            ValueError: also if prompt and answer together are longer than ``block_size``.
        """
        longest = prompt.shape[-1] if mask is None else int(mask.sum(1).max())
        if longest + max_new_tokens - 1 > self.config.block_size:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones need "
                f"{longest + max_new_tokens - 1} positions, block_size is "
                f"{self.config.block_size}: shorten the prompt or max_new_tokens"
            )
        return super().generate(prompt, max_new_tokens=max_new_tokens, mask=mask, **options)

    def _blocks(self) -> list[FlowformerBlock]:
        return cast(list[FlowformerBlock], list(self.layers))

    def _embed(self, tokens: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        last = self.config.block_size - 1
        if places.shape[-1] > self.config.block_size:
            self._check_length(places, mask)
        # What stands at padding is never read, wherever its position would be.
        return self.dropout(self.embed(tokens) + self.positions(places.clamp_max(last)))

    def _check_length(self, places: Tensor, mask: Tensor | None) -> None:
        used = places if mask is None else places.expand_as(mask)[mask]
        if used.numel() and (longest := int(used.max()) + 1) > self.config.block_size:
            raise ValueError(
                f"length {longest} is more than block_size {self.config.block_size}: there are no "
                "learned positions beyond it"
            )

    def key_map(self) -> KeyMap:
        """Names of the official GPT module."""
        ours, theirs = "layers.{}.", "transformer.h.{}."
        pairs = [
            *((f"mixer.{a}_proj", f"attn.{b}_projection") for a, b in _PROJECTIONS),
            ("mixer_norm", "ln_1"),
            ("mlp_norm", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ]
        kinds = ("weight", "bias")
        head = tied("embed.weight", "lm_head.weight") if self.config.tie_embeddings else None
        return KeyMap(
            rename("embed.weight", "transformer.wte.weight"),
            rename("positions.weight", "transformer.wpe.weight"),
            *(rename(f"{ours}{a}.{k}", f"{theirs}{b}.{k}") for a, b in pairs for k in kinds),
            *(rename(f"norm.{k}", f"transformer.ln_f.{k}") for k in kinds),
            head or rename("head.weight", "lm_head.weight"),
        )


_PROJECTIONS = (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))

register_variants(
    FlowformerGPT,
    "flowformer",
    {
        **{kind.replace("-", "_"): (config, (kind,)) for kind, config in _TYPES.items()},
        # A reconstruction: sizes, shared embeddings and clamp of the WikiText-103 model in the
        # layout of GPT; the original was a module for a toolkit whose layout is not described.
        "flowformer_wikitext103": (
            FlowformerGPTConfig(
                vocab_size=267744, embed_dim=512, num_layers=6, num_heads=8, block_size=512,
                clamp=5.0, tie_embeddings=True,
            ),
            (),
        ),
    },
)  # fmt: skip
