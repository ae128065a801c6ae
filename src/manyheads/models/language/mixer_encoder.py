"""A classifier of sequences whose layers are any mechanisms, by pattern; ragged input included.

B batch, N length, C embed_dim, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.absolute import sinusoidal
from manyheads.layers.keymap import KeyMap
from manyheads.layers.mlp import swiglu_width
from manyheads.layers.norms import RMSNorm
from manyheads.layers.ragged import check_cu_seqlens, check_mask, sequence_ids
from manyheads.layers.sharing import SharingConfig, named_slots, share
from manyheads.models.base import Model
from manyheads.models.language.mixer_lm import (
    POSITION_SCALE,
    MixerBlock,
    build_mixer,
    initialise,
    packed_positions,
)
from manyheads.models.language.pattern import parse_pattern
from manyheads.models.language.sharing import exported
from manyheads.registry import get_mechanism

__all__ = ["MixerEncoder", "MixerEncoderConfig", "turned"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixerEncoderConfig(Config):
    """Sizes of a :class:`MixerEncoder`; exactly one of ``vocab_size`` and ``in_channels`` is set.

    Attributes:
        num_classes: K.
        vocab_size: of token input.
        in_channels: of continuous input, (B, N, in_channels).
        mixers, mixer_options, num_layers, num_heads, embed_dim, mlp_ratio, mlp_multiple,
        max_length, norm_eps, dropout: as in ``MixerLMConfig``. A mechanism without a
            bidirectional form reads every other layer from the end.
        add_positions: sinusoidal positions on the embedded input; "auto" as in ``MixerLMConfig``.
        pool: "mean" of the real tokens, the "first" or the "last" of them.
        sharing: how layers share their attention matrices, as in ``MixerLMConfig``.
        backwards: which layers read from the end, those without a bidirectional form alone; None:
            every other layer.
    """

    num_classes: int
    vocab_size: int | None = None
    in_channels: int | None = None
    embed_dim: int = 128
    num_layers: int | None = None
    num_heads: int = 4
    mixers: str | tuple[str, ...] = "softmax*4"
    mixer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mlp_ratio: float = 4
    mlp_multiple: int = 32
    add_positions: bool | Literal["auto"] = "auto"
    max_length: int = 2048
    norm_eps: float = 1e-6
    dropout: float = 0.0
    pool: Literal["mean", "first", "last"] = "mean"
    sharing: dict[str, Any] = field(default_factory=dict)
    backwards: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.in_channels is None):
            raise ValueError("set vocab_size for tokens or in_channels for real input, one of them")
        if self.pool not in ("mean", "first", "last"):
            raise ValueError(f"pool {self.pool!r} must be 'mean', 'first' or 'last'")
        if self.sharing:
            SharingConfig.from_dict(self.sharing)
        count = len(self.layer_types)
        if self.backwards is not None and len(self.backwards) != count:
            raise ValueError(f"backwards names {len(self.backwards)} layers of {count}: name each")

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The mechanism of each layer."""
        return parse_pattern(self.mixers, self.num_layers)

    @property
    def directions(self) -> tuple[bool, ...]:
        """Whether each layer reads from the end: causal layers do in turn, so that both directions
        are seen.
        """
        turned = self.backwards or [number % 2 == 1 for number in range(len(self.layer_types))]
        return tuple(
            bool(back) and not get_mechanism(name).bidirectional
            for name, back in zip(self.layer_types, turned, strict=True)
        )

    @property
    def has_positions(self) -> bool:
        """Whether positions are added to the embedded input."""
        if self.add_positions == "auto":
            return not all(get_mechanism(n).positional for n in self.layer_types)
        return self.add_positions


class MixerEncoder(Model):
    """Sequence classifier over token or continuous input. Needs training.

    Example:
        >>> model = MixerEncoder(MixerEncoderConfig(num_classes=5, in_channels=6, mixers="flow*2"))
        >>> model(torch.randn(2, 100, 6)).shape
        torch.Size([2, 5])
    """

    config_class: ClassVar[type[Config]] = MixerEncoderConfig
    config: MixerEncoderConfig

    def __init__(self, config: MixerEncoderConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed: nn.Module
        if c.vocab_size is not None:
            self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        else:
            assert c.in_channels is not None
            self.embed = nn.Linear(c.in_channels, c.embed_dim)
        hidden = swiglu_width(c.embed_dim, ratio=c.mlp_ratio, multiple=c.mlp_multiple)
        blocks: list[MixerBlock] = []
        for name in c.layer_types:
            both_ways = get_mechanism(name).bidirectional
            mixer = build_mixer(
                name,
                embed_dim=c.embed_dim,
                num_heads=c.num_heads,
                is_causal=not both_ways,
                max_length=c.max_length,
                options=c.mixer_options.get(name, {}),
            )
            blocks.append(MixerBlock(mixer, c.embed_dim, hidden, eps=c.norm_eps, dropout=c.dropout))
        for block, backwards in zip(blocks, c.directions, strict=True):
            block.backwards = backwards
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.head = nn.Linear(c.embed_dim, c.num_classes)
        initialise(self, blocks)
        if c.sharing:
            share(self, named_slots(self), SharingConfig.from_dict(c.sharing))

    def features(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the normalised token features (B, N, C)."""
        mask = check_mask(mask, x.shape[0], x.shape[1])
        length = x.shape[1]
        h = self.embed(x)
        if self.config.has_positions:
            places = packed_positions(length, mask, cu_seqlens, x.device)
            scale = 1.0 if self.config.vocab_size is None else POSITION_SCALE
            h = h + scale * sinusoidal(places, self.config.embed_dim).to(h)
        for block in cast(list[MixerBlock], list(self.layers)):
            if block.backwards:
                order = turned(length, cu_seqlens, x.device)
                flipped = None if mask is None else mask[:, order]
                h = block(h[:, order], flipped, cu_seqlens)[:, order]
            else:
                h = block(h, mask, cu_seqlens)
        return self.norm(h)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Classify sequences.

        Args:
            x: tokens (B, N) or real input (B, N, in_channels).
            mask: (B, N), True = a real token.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.

        Returns:
            Logits (B, K), or (S, K) of packed sequences.
        """
        h = self.features(x, mask=mask, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
            return self.head(self._pool_packed(h[0], cu_seqlens))
        if mask is None:
            pooled = {"mean": h.mean(1), "first": h[:, 0], "last": h[:, -1]}[self.config.pool]
            return self.head(pooled)
        real = mask.bool()
        if self.config.pool == "mean":
            count = real.sum(1, keepdim=True).clamp_min(1)
            return self.head((h * real[..., None]).sum(1) / count)
        places = torch.arange(h.shape[1], device=h.device)
        if self.config.pool == "first":
            index = real.int().argmax(1)
        else:
            index = (real * places).argmax(1)
        return self.head(h[torch.arange(h.shape[0], device=h.device), index])

    def _pool_packed(self, h: Tensor, cu_seqlens: Tensor) -> Tensor:
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        if self.config.pool == "first":
            return h[starts]
        if self.config.pool == "last":
            return h[ends - 1]
        ids = sequence_ids(cu_seqlens, h.shape[0])
        total = h.new_zeros(len(starts), h.shape[1]).index_add(0, ids, h)
        return total / (ends - starts).clamp_min(1)[:, None]

    def export(self, *, dense: bool = True) -> Self:
        """Return a copy for use, of a model whose layers share matrices; exact.

        Args:
            dense: every layer has its mixed matrices, and nothing is shared any more; False: the
                atoms stay, and a network that made coefficients gives way to its table.
        """
        return exported(self, dense=dense)

    def key_map(self) -> KeyMap:
        """A MixerEncoder is our own: official names are ours."""
        raise ValueError("MixerEncoder has no official checkpoints: use save() and load()")


def turned(length: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """Return the index that reverses the row, or each packed sequence by itself."""
    places = torch.arange(length, device=device)
    if cu_seqlens is None:
        return places.flip(0)
    ids = sequence_ids(cu_seqlens, length)
    return cu_seqlens[ids] + cu_seqlens[ids + 1] - 1 - places
