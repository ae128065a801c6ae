"""A decoder whose layers are any causal mechanisms, by pattern.

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.absolute import sinusoidal
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.mlp import GatedMLP, PlainMLP, swiglu_width
from manyheads.layers.norms import RMSNorm
from manyheads.layers.ragged import positions, sequence_ids
from manyheads.layers.sharing import SharingConfig, named_slots, share
from manyheads.models.base import Model
from manyheads.models.language.causal import CausalLM, LMState
from manyheads.models.language.pattern import parse_pattern
from manyheads.models.language.sharing import exported
from manyheads.registry import get_mechanism

__all__ = [
    "POSITION_SCALE",
    "MixerBlock",
    "MixerLM",
    "MixerLMConfig",
    "build_mixer",
    "initialise",
    "packed_positions",
]

_EMBED_STD = 0.02
# Sines have an rms of 1/√2: beside token embeddings of _EMBED_STD they would be all that a norm
# leaves to see. Embeddings grow in training and these do not, so they start a few times as large.
POSITION_SCALE = 5 * _EMBED_STD


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerLMConfig(Config):
    """Sizes of a :class:`MixerLM`.

    Attributes:
        vocab_size: V; 256 for bytes.
        embed_dim: C.
        num_layers: None for as many as ``mixers`` names; else ``mixers`` is repeated.
        num_heads: heads of every layer.
        mixers: mechanisms by layer, "gla*3,softmax" or a tuple of names.
        mixer_options: further options of a mechanism's config, by mechanism name.
        mlp_ratio: hidden width of a plain MLP; the gated one has as many parameters.
        mlp_multiple: its width is rounded up to this.
        mlp: "gated" (SwiGLU), or "gelu": the plain one.
        tie_embeddings: whether the output matrix is the embedding.
        add_positions: sinusoidal positions on the embeddings; "auto": where a mechanism of the
            pattern does not know positions by itself.
        max_length: for mechanisms with a table of positions.
        norm_eps, dropout: as named; dropout acts on both branches.
        sharing: how layers share their attention matrices, options of
            :class:`~manyheads.layers.sharing.SharingConfig`, such as ``{"atoms": 4}``; empty:
            every layer has its own.
    """

    vocab_size: int = 256
    embed_dim: int = 256
    num_layers: int | None = None
    num_heads: int = 4
    mixers: str | tuple[str, ...] = "softmax*4"
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp_ratio: float = 4
    mlp_multiple: int = 32
    mlp: Literal["gated", "gelu"] = "gated"
    tie_embeddings: bool = True
    add_positions: bool | Literal["auto"] = "auto"
    max_length: int = 2048
    norm_eps: float = 1e-6
    dropout: float = 0.0
    sharing: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mlp not in ("gated", "gelu"):
            raise unknown_name("mlp", self.mlp, ("gated", "gelu"))
        if self.sharing:
            SharingConfig.from_dict(self.sharing)
        names = set(self.layer_types)
        for name in self.mixer_options:
            if name not in names:
                raise ValueError(
                    f"mixer_options names {name!r}, which {self.mixers!r} does not use"
                )

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The mechanism of each layer."""
        return parse_pattern(self.mixers, self.num_layers)

    @property
    def has_positions(self) -> bool:
        """Whether positions are added to the embeddings."""
        if self.add_positions == "auto":
            return not all(get_mechanism(n).positional for n in self.layer_types)
        return self.add_positions


def build_mixer(
    name: str,
    *,
    embed_dim: int,
    num_heads: int,
    is_causal: bool,
    max_length: int,
    options: dict[str, Any],
) -> SequenceMixer:
    """Build the module of a mechanism; ``max_length`` goes to those whose config asks for it."""
    mechanism = get_mechanism(name)
    values: dict[str, Any] = {
        "embed_dim": embed_dim, "num_heads": num_heads, "is_causal": is_causal
    }  # fmt: skip
    if "max_length" in {f.name for f in fields(mechanism.config)}:
        values["max_length"] = max_length
    return mechanism.module(mechanism.config.from_dict(values | options))


class MixerBlock(nn.Module):
    """x += mixer(norm(x)); x += mlp(norm(x)), with a gated MLP or a plain one."""

    backwards = False  # whether an encoder gives it sequences from their end

    def __init__(
        self,
        mixer: SequenceMixer,
        dim: int,
        hidden: int,
        *,
        eps: float,
        dropout: float,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(dim, eps=eps)
        self.mixer = mixer
        self.mlp_norm = RMSNorm(dim, eps=eps)
        self.mlp = GatedMLP(dim, hidden) if gated else PlainMLP(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        mixed = self.mixer(self.mixer_norm(x), mask=mask, cu_seqlens=cu_seqlens)
        x = x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))

    def update(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.update(self.mixer_norm(x), state, mask=mask)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


def initialise(model: Model, blocks: list[MixerBlock]) -> None:
    """Embeddings N(0, 0.02); the last matrix of each branch is shrunk by sqrt(2 · layers)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_EMBED_STD)
    with torch.no_grad():
        for block in blocks:
            block.mlp.down_proj.weight.mul_((2 * len(blocks)) ** -0.5)
            out = getattr(block.mixer, "out_proj", None)
            if isinstance(out, nn.Linear):
                out.weight.mul_((2 * len(blocks)) ** -0.5)


def packed_positions(
    length: int, mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Return positions among real tokens, or inside each packed sequence: (N,) or (B, N)."""
    if cu_seqlens is None:
        return positions(mask, length, device=device)
    return torch.arange(length, device=device) - cu_seqlens[sequence_ids(cu_seqlens, length)]


class MixerLM(CausalLM):
    """Decoder language model with one state for layers of all kinds. Needs training.

    Example:
        >>> model = MixerLM(MixerLMConfig(embed_dim=64, num_heads=2, mixers="gla*3,softmax"))
        >>> model(torch.randint(256, (1, 100))).shape
        torch.Size([1, 100, 256])
    """

    config_class: ClassVar[type[Config]] = MixerLMConfig
    config: MixerLMConfig

    def __init__(self, config: MixerLMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        hidden = int(c.embed_dim * c.mlp_ratio)
        if c.mlp == "gated":
            hidden = swiglu_width(c.embed_dim, ratio=c.mlp_ratio, multiple=c.mlp_multiple)
        blocks = [
            MixerBlock(
                build_mixer(
                    name,
                    embed_dim=c.embed_dim,
                    num_heads=c.num_heads,
                    is_causal=True,
                    max_length=c.max_length,
                    options=c.mixer_options.get(name, {}),
                ),
                c.embed_dim,
                hidden,
                eps=c.norm_eps,
                dropout=c.dropout,
                gated=c.mlp == "gated",
            )
            for name in c.layer_types
        ]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        initialise(self, blocks)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        if c.sharing:
            share(self, named_slots(self), SharingConfig.from_dict(c.sharing))

    @property
    def _blocks(self) -> list[MixerBlock]:
        return cast(list[MixerBlock], list(self.layers))

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); other arguments as in the layers."""
        x = self.embed(tokens)
        if self.config.has_positions:
            places = packed_positions(tokens.shape[1], mask, cu_seqlens, tokens.device)
            x = x + POSITION_SCALE * sinusoidal(places, self.config.embed_dim).to(x)
        for block in self._blocks:
            x = block(x, mask, cu_seqlens)
        return self.head(self.norm(x))

    def init_state(self, batch_size: int) -> LMState:
        layers = tuple(block.mixer.init_state(batch_size) for block in self._blocks)
        if self.make_caches is not None:
            layers = self.make_caches(self, layers)
        device = self.embed.weight.device
        return LMState(layers, torch.zeros(batch_size, dtype=torch.long, device=device))

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        places = positions(mask, tokens.shape[1], device=tokens.device) + state.position[:, None]
        x, states = self._embed(tokens, places), []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.update(x, own, mask)
            states.append(own)
        count = tokens.shape[1] if mask is None else mask.sum(1)
        return self.head(self.norm(x)), LMState(tuple(states), state.position + count)

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        x, states = self._embed(tokens, state.position), []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.step(x, own)
            states.append(own)
        return self.head(self.norm(x)), LMState(tuple(states), state.position + 1)

    def _embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.config.has_positions:
            x = x + POSITION_SCALE * sinusoidal(places, self.config.embed_dim).to(x)
        return x

    def export(self, *, dense: bool = True) -> Self:
        """Return a copy for use, of a model whose layers share matrices; exact.

        Args:
            dense: every layer has its mixed matrices, and nothing is shared any more; False: the
                atoms stay, and a network that made coefficients gives way to its table.
        """
        return exported(self, dense=dense)

    def key_map(self) -> KeyMap:
        """A MixerLM is our own: official names are ours."""
        raise ValueError("MixerLM has no official checkpoints: use save() and load()")
