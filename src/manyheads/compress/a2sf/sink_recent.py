"""First and newest tokens, at the positions that they had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.compress.a2sf.policy import CacheConfig, CachePolicy
from manyheads.config import Config

__all__ = ["SinkConfig", "SinkRecent"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SinkConfig(CacheConfig):
    """Settings of policies without scores.

    Attributes:
        sink: first tokens that are never evicted
        recent: must be left out: what the first tokens leave of the budget
    """

    sink: int = 4

    def __post_init__(self) -> None:
        CacheConfig.__post_init__(self)
        if self.cross_budget is not None:
            raise ValueError(
                f"cross_budget is {self.cross_budget}, but an encoder's positions are there all at "
                "once, and none is first or recent: use a2sf, h2o or snapkv"
            )
        if self.recent is not None:
            raise ValueError(
                f"recent is {self.recent}, but without scores all of the budget beyond sink="
                f"{self.sink} is recent: leave it out"
            )


class SinkRecent(CachePolicy):
    """Keep the first ``sink`` and the newest tokens. **Lossy**, no training, no scores.

    Tokens keep their positions, so that distances to the first ones grow; models with learned
    positions (GPT-2, OPT, Whisper) need this one. :class:`StreamingLLM` moves the first ones.

    Example:
        >>> SinkRecent(budget=64).split(64)
        Split(sink=4, select=0, recent=60)
    """

    name: ClassVar[str] = "sink-recent"
    settings_class: ClassVar[type[Config]] = SinkConfig
    needs_scores: ClassVar[bool] = False

    def _recent(self, budget: int) -> int:
        return budget

    def weights(self, real: Tensor, *, prompt: bool) -> Tensor | None:
        return None

    def decay(self, real: Tensor, *, prompt: bool) -> Tensor:
        return torch.ones(())
