"""A stack of Aaren layers that trains in parallel and streams in constant memory (2405.13956).

B batch, N length, C embed_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self, cast

from torch import Tensor, nn

from manyheads.config import Config
from manyheads.layers.keymap import KeyMap, rename
from manyheads.models.base import Model
from manyheads.models.language.aaren.layer import (
    AarenLayer,
    AarenLayerConfig,
    encoder_options,
    layer_entries,
)
from manyheads.models.language.causal import LMState

__all__ = ["AarenStack", "AarenStackConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenStackConfig(AarenLayerConfig):
    """Sizes and options of the layers, and:

    Attributes:
        num_layers: each has its own query.
        final_norm: a LayerNorm after the last layer, as goes with ``norm_first``.
    """

    num_layers: int = 4
    final_norm: bool = False

    @property
    def layer(self) -> AarenLayerConfig:
        """The config of one layer."""
        names = AarenLayerConfig().to_dict()
        return AarenLayerConfig.from_dict({n: getattr(self, n) for n in names})


class AarenStack(Model):
    """Aaren layers on embedded tokens; output k depends on inputs 1..k only. Needs training.

    Blind to order inside a prefix: add positions or times to the inputs where order matters.

    Example:
        >>> stack = AarenStack(AarenStackConfig(embed_dim=64, num_heads=4, ff_dim=128))
        >>> stack(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    config_class: ClassVar[type[Config]] = AarenStackConfig
    config: AarenStackConfig

    def __init__(self, config: AarenStackConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(AarenLayer(config.layer) for _ in range(config.num_layers))
        self.norm = None
        if config.final_norm:
            self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps, bias=config.bias)

    @classmethod
    def from_encoder(
        cls, encoder: nn.TransformerEncoder, *, queries: Sequence[Tensor] | None = None
    ) -> Self:
        """Take over the weights of a torch encoder; see :meth:`AarenLayer.from_encoder_layer`.

        Args:
            encoder: its layers and, if any, its last LayerNorm.
            queries: one query token (C) a layer; drawn at random unless given.
        """
        layers = cast(list[nn.TransformerEncoderLayer], list(encoder.layers))
        options = encoder_options(layers[0])
        final = encoder.norm is not None
        own = cls(AarenStackConfig(**options, num_layers=len(layers), final_norm=final))
        own.to(layers[0].linear1.weight)
        for i, layer in enumerate(layers):
            query = None if queries is None else queries[i]
            own.layers[i] = AarenLayer.from_encoder_layer(layer, query=query)
        if own.norm is not None and encoder.norm is not None:
            own.norm.load_state_dict(encoder.norm.state_dict())
        return own.train(encoder.training)

    @property
    def _layers(self) -> list[AarenLayer]:
        return cast(list[AarenLayer], list(self.layers))

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return (B, N, C) of (B, N, C); arguments as :meth:`AarenLayer.forward`."""
        return self._last(self.intermediates(x, mask=mask, cu_seqlens=cu_seqlens)[-1])

    def intermediates(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the output of every layer, before the final norm."""
        outputs = []
        for layer in self._layers:
            x = layer(x, mask=mask, cu_seqlens=cu_seqlens)
            outputs.append(x)
        return tuple(outputs)

    def init_state(self, batch_size: int) -> LMState:
        """Return the state before the first token: L · H (D + 2) numbers a row."""
        return LMState(tuple(layer.init_state(batch_size) for layer in self._layers))

    def update(
        self, x: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """Read a block (B, N, C): the outputs and the next state."""
        states = []
        for layer, own in zip(self._layers, state.layers, strict=True):
            x, own = layer.update(x, own, mask=mask)
            states.append(own)
        return self._last(x), state._replace(layers=tuple(states))

    def step(self, x: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Read one token a row, (B, C), in constant time and memory."""
        states = []
        for layer, own in zip(self._layers, state.layers, strict=True):
            x, own = layer.step(x, own)
            states.append(own)
        return self._last(x), state._replace(layers=tuple(states))

    def _last(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def key_map(self) -> KeyMap:
        """Names of a layer behind its index, and those of the final norm."""
        return KeyMap(
            *layer_entries(self.config, ours="layers.{}.", official="{}."),
            *(rename(f"norm.{k}", f"norm.{k}") for k in ("weight", "bias")),
        )
