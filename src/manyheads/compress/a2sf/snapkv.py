"""SnapKV: what the last queries of the prompt look at (2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.compress.a2sf.policy import CacheConfig, CachePolicy
from manyheads.config import Config

__all__ = ["SnapKV", "SnapKVConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapKVConfig(CacheConfig):
    """Settings of SnapKV.

    Attributes:
        window: last queries of the prompt whose attention counts, all alike.
        pool: odd width of the maximum that scores are smoothed by; 1 for none.
    """

    window: int = 16
    pool: int = 5

    def __post_init__(self) -> None:
        CacheConfig.__post_init__(self)
        if self.window < 1:
            raise ValueError(f"window is {self.window}, expected 1 or more queries")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}, expected an odd width (1 for none)")


class SnapKV(CachePolicy):
    """Keep what the last ``window`` queries of the prompt attend to. **Lossy**, no training.

    Decided once, on the prompt. While generating, the newest tokens slide: what was chosen stays,
    and generated tokens are forgotten in order (``decode=False`` keeps them all, as published). A
    prompt read in chunks is judged by each chunk's last queries; encoder positions
    (``cross_budget``) by the last ones of the decoder's prompt. Reads 2404.14469.

    Example:
        >>> SnapKV(budget=64, window=8).split(64)
        Split(sink=0, select=56, recent=8)
    """

    name: ClassVar[str] = "snapkv"
    settings_class: ClassVar[type[Config]] = SnapKVConfig

    def _recent(self, budget: int) -> int:
        return min(self.settings.window, budget)

    @property
    def cross_queries(self) -> int:
        return 0  # decided on the prompt, however short

    def weights(self, real: Tensor, *, prompt: bool) -> Tensor | None:
        if not prompt:
            return None
        later = real.flip(-1).cumsum(-1).flip(-1) - real.long()
        return ((later < self.settings.window) & real).float()

    def decay(self, real: Tensor, *, prompt: bool) -> Tensor:
        if not prompt:
            return torch.ones((), device=real.device)
        return (real.sum(-1) < self.settings.window).float()

    def rank(self, scores: Tensor) -> Tensor:
        width = self.settings.pool
        return scores if width == 1 else F.max_pool1d(scores, width, 1, width // 2)
