"""Classification of sequences of vectors by the last real output of an Aaren stack.

B batch, N length, F channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from manyheads.config import Config
from manyheads.models.language.aaren.tasks import AarenTaskConfig, AarenTaskModel, last_real
from manyheads.models.language.causal import LMState

__all__ = ["AarenClassifier", "AarenClassifierConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenClassifierConfig(AarenTaskConfig):
    """Sizes of the stack, and ``in_channels`` F and ``num_classes`` K."""

    in_channels: int
    num_classes: int


class AarenClassifier(AarenTaskModel):
    """Causal classifier of time series: also says, at any time, what it thinks so far.

    Example:
        >>> model = AarenClassifier(AarenClassifierConfig(in_channels=6, num_classes=4))
        >>> model(torch.randn(2, 100, 6)).shape
        torch.Size([2, 4])
    """

    config_class: ClassVar[type[Config]] = AarenClassifierConfig
    config: AarenClassifierConfig

    def __init__(self, config: AarenClassifierConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.in_channels, config.embed_dim)
        self.head = nn.Linear(config.embed_dim, config.num_classes)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, K) of whole sequences (B, N, F), or (S, K) of packed ones.

        Args:
            x: the inputs.
            mask: (B, N), True = a real token, at least one a row.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.
        """
        hidden = self._encode(self.embed(x), mask, cu_seqlens)
        return self.head(last_real(hidden, mask, cu_seqlens))

    def init_state(self, batch_size: int) -> LMState:
        """Return the state before the first token."""
        return self._first_state(batch_size)

    def update(
        self, x: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        """Read a block (B, N, F): logits after every token, (B, N, K), and the next state."""
        hidden, state = self._encode_update(self.embed(x), state, mask)
        return self.head(hidden), state

    def step(self, x: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Read one token a row, (B, F): logits (B, K) and the next state."""
        hidden, state = self._encode_step(self.embed(x), state)
        return self.head(hidden), state
