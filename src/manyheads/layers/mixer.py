"""The contract of a sequence mixer: one module, three ways to feed it.

B batch, N length, C embed_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from manyheads.config import Config
from manyheads.layers.keymap import OfficialWeights

__all__ = ["SequenceMixer"]


class SequenceMixer(OfficialWeights):
    """Base of every sequence mechanism's module.

    ``forward`` takes whole sequences and returns (B, N, C). Where the mechanism streams,
    ``update`` takes a block and a state, ``step`` one token and a state; both return the output
    and the next state, and any split of a sequence over the three gives the same outputs.
    """

    config: Any
    mechanism: ClassVar[str]

    @abstractmethod
    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (B, N, C).
            mask: (B, N), True = a real token; padding on either side changes no real token.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.

        Returns:
            (B, N, C); what stands at padded tokens is not defined.
        """

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """Return the state before the first token."""
        raise ValueError(f"{type(self).__name__} with is_causal=False has no streaming form")

    def update(self, x: Tensor, state: Any, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mix the next block of tokens.

        Args:
            x: (B, N, C).
            state: what :meth:`init_state`, :meth:`update` or :meth:`step` returned; consumed.
            mask: (B, N), True = a real token; padded tokens leave the state as it is.

        Returns:
            The output (B, N, C) and the next state.
        """
        raise ValueError(f"{type(self).__name__} with is_causal=False has no streaming form")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Mix one token: x (B, C) to (B, C) and the next state."""
        out, state = self.update(x[:, None], state)
        return out[:, 0], state

    @classmethod
    def from_config(cls, config: Config) -> SequenceMixer:
        """Build from the mechanism's own config."""
        return cls(config)
