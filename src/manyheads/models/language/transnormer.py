"""The TransNormer language model: block-local attention, then linear attention (2210.10340).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.keymap import Entry, KeyMap, constant, read_weights, rename
from manyheads.layers.norms import simple_rms_norm
from manyheads.layers.ragged import check_mask
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState
from manyheads.models.language.transnormer_blocks import (
    TransNormerBlock,
    TransNormerConfig,
    block_entries,
    drop_prefix,
    fairseq_places,
    fairseq_sinusoidal,
)

__all__ = ["TransNormerLM", "TransNormerLMConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransNormerLMConfig(TransNormerConfig):
    """Sizes of the language model; the defaults are those published for WikiText-103."""

    vocab_size: int = 267744
    embed_dim: int = 512
    num_layers: int = 6
    num_heads: int = 8


class _TiedHead(nn.Module):
    """The product with the embedding, as a module: a place to reach what the logits are made of."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.linear(x, weight)


class TransNormerLM(CausalLM):
    """Pre-norm decoder; constant memory while it generates. Needs training.

    The first half of the layers sees blocks of 64 tokens, the second half everything before.

    Example:
        >>> model = TransNormerLM(TransNormerLMConfig(vocab_size=50, embed_dim=64, num_layers=2))
        >>> model(torch.randint(50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = TransNormerLMConfig
    config: TransNormerLMConfig

    def __init__(self, config: TransNormerLMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim, padding_idx=c.padding_idx)
        self.layers = nn.ModuleList(
            TransNormerBlock(c, name, is_causal=True, pre_norm=True) for name in c.types
        )
        self.dropout = nn.Dropout(c.dropout)
        self.head = _TiedHead()
        nn.init.normal_(self.embed.weight, std=c.embed_dim**-0.5)
        with torch.no_grad():
            self.embed.weight[c.padding_idx].zero_()

    @property
    def _blocks(self) -> list[TransNormerBlock]:
        return cast(list[TransNormerBlock], list(self.layers))

    def hidden(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return what enters the first layer and what leaves each: (B, N, C) tensors."""
        mask = self._mask(tokens, mask)
        padding = self.config.padding_idx
        states = [
            self._embed(tokens, fairseq_places(tokens, padding, mask=mask, cu_seqlens=cu_seqlens))
        ]
        for block in self._blocks:
            states.append(block(states[-1], mask, cu_seqlens))
        return tuple(states)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); ``mask`` and ``cu_seqlens`` as in the layers.

        Without a mask, tokens with the padding id are read as published: see
        ``TransNormerLMConfig.respect_padding``.
        """
        return self._logits(self.hidden(tokens, mask=mask, cu_seqlens=cu_seqlens)[-1])

    def init_state(self, batch_size: int) -> LMState:
        device = self.embed.weight.device
        return LMState(
            tuple(block.mixer.init_state(batch_size) for block in self._blocks),
            torch.zeros(batch_size, dtype=torch.long, device=device),
        )

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        mask = self._mask(tokens, mask)
        places, position = self._continue(tokens, state, mask)
        x, states = self._embed(tokens, places), []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.update(x, own, mask)
            states.append(own)
        return self._logits(x), LMState(tuple(states), position)

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        if self.config.respect_padding:
            return super().step(tokens, state)
        places, position = self._continue(tokens[:, None], state, None)
        x, states = self._embed(tokens[:, None], places)[:, 0], []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.step(x, own)
            states.append(own)
        return self._logits(x), LMState(tuple(states), position)

    def _continue(
        self, tokens: Tensor, state: LMState, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the block's position numbers and how many tokens had one, this block included."""
        padding = self.config.padding_idx
        places = fairseq_places(tokens, padding, mask=mask, before=state.position)
        return places, state.position + (places != padding).sum(1)

    def _mask(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        if mask is None and self.config.respect_padding:
            return tokens != self.config.padding_idx
        return check_mask(mask, tokens.shape[0], tokens.shape[1])

    def _embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        c = self.config
        x = self.embed(tokens) * c.embed_dim**0.5
        x = x + fairseq_sinusoidal(places, c.embed_dim, c.padding_idx).to(x)
        return self.dropout(x)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(simple_rms_norm(x, eps=self.config.eps), self.embed.weight)

    def load_official(self, source: str | PathLike[str] | Mapping[str, Any]) -> Self:
        """Load an official checkpoint, with fairseq's prefix ``decoder.`` or without; strict."""
        return super().load_official(drop_prefix(read_weights(source), "decoder."))

    def key_map(self) -> KeyMap:
        """Names of the official decoder, without fairseq's prefix ``decoder.``."""
        return KeyMap(
            constant("version", torch.full((1,), 3.0), optional=True),
            rename("embed.weight", "embed_tokens.weight"),
            constant("embed_positions._float_tensor", torch.zeros(1), optional=True),
            *block_entries(""),
            Entry(("embed.weight",), ("output_projection.weight",), is_tied=True, optional=True),
        )


register_variants(
    TransNormerLM,
    "transnormer",
    {
        f"transnormer_{t}": (TransNormerLMConfig(variant=t), (f"lm_{t}_wikitext103",))
        for t in ("t1", "t2")
    },
)
