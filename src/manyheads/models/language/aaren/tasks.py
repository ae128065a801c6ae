"""What the task models share: embedded tokens, positions, a stack, and one state.

B batch, N length, C embed_dim. The paper swaps attention in existing models and publishes no
code: these models are a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manyheads.layers.absolute import sinusoidal
from manyheads.layers.ragged import check_mask, positions, sequence_ids
from manyheads.models.base import Model
from manyheads.models.language.aaren.stack import AarenStack, AarenStackConfig
from manyheads.models.language.causal import LMState

__all__ = ["AarenTaskConfig", "AarenTaskModel", "last_real"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenTaskConfig(AarenStackConfig):
    """Sizes of the stack, and:

    Attributes:
        add_positions: sinusoidal positions on the embedded tokens; without them a prefix is a
            set.
    """

    embed_dim: int = 128
    num_heads: int = 8
    ff_dim: int = 512
    num_layers: int = 2
    add_positions: bool = True

    @property
    def stack(self) -> AarenStackConfig:
        """The config of the stack."""
        names = AarenStackConfig().to_dict()
        return AarenStackConfig.from_dict({n: getattr(self, n) for n in names})


class AarenTaskModel(Model):
    """Base of the task models: ``_encode`` and its streaming twin turn embedded tokens to hidden.

    The state is an :class:`LMState`: one (m, u, w) a layer and the tokens read by each row.
    """

    config: AarenTaskConfig

    def __init__(self, config: AarenTaskConfig) -> None:
        super().__init__()
        self.config = config
        self.stack = AarenStack(config.stack)

    def _first_state(self, batch_size: int) -> LMState:
        layers = self.stack.init_state(batch_size).layers
        device = layers[0].m.device
        return LMState(layers, torch.zeros(batch_size, dtype=torch.long, device=device))

    def _encode(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        if cu_seqlens is None:
            places = positions(mask, x.shape[1], device=x.device)
        else:
            ids = sequence_ids(cu_seqlens, x.shape[1])
            places = torch.arange(x.shape[1], device=x.device) - cu_seqlens[ids]
        return self.stack(self._place(x, places), mask=mask, cu_seqlens=cu_seqlens)

    def _encode_update(
        self, x: Tensor, state: LMState, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        places = positions(mask, x.shape[1], device=x.device) + state.position[:, None]
        out, state = self.stack.update(self._place(x, places), state, mask=mask)
        count = x.shape[1] if mask is None else mask.sum(1)
        return out, state._replace(position=state.position + count)

    def _encode_step(self, x: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        out, state = self.stack.step(self._place(x, state.position), state)
        return out, state._replace(position=state.position + 1)

    def _place(self, x: Tensor, places: Tensor) -> Tensor:
        if not self.config.add_positions:
            return x
        return x + sinusoidal(places, self.config.embed_dim).to(x)


def last_real(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return what stands at the last real token of each sequence: (B, N, C) to (B, C) or (S, C).

    Raises:
        ValueError: a sequence without a real token.
    """
    if cu_seqlens is not None:
        if bool((cu_seqlens.diff() < 1).any()):
            raise ValueError("a packed sequence is empty: every sequence needs a real token")
        return x[0, cu_seqlens[1:] - 1]
    if mask is None:
        if x.shape[1] == 0:
            raise ValueError("length 0: every sequence needs a real token")
        return x[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = places.masked_fill(~mask, -1).amax(1)
    if not torch.compiler.is_compiling() and bool((last < 0).any()):
        raise ValueError("a row of mask has no True: every sequence needs a real token")
    return x[torch.arange(len(x), device=x.device), last]
