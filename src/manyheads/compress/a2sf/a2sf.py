"""A2SF: accumulated attention that forgets (2407.20485)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyheads.compress.a2sf.policy import CacheConfig, CachePolicy
from manyheads.compress.a2sf.scores import forgetting_weights
from manyheads.config import Config

__all__ = ["A2SF", "A2SFConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class A2SFConfig(CacheConfig):
    """Settings of A2SF.

    Attributes:
        alpha: forgetting factor in [0, 1]: scores remember about 1 / (1 - alpha) queries. 1 is
            H2O, 0 keeps what the last query looks at (TOVA, per head). Tune it to the model.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        CacheConfig.__post_init__(self)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, expected a factor in [0, 1]")


class A2SF(CachePolicy):
    """Keep the tokens with the most attention, where old attention fades. **Lossy**, no training.

    In a causal model early tokens are seen by more queries, so that a plain sum favours them.
    Here the running sum is multiplied by ``alpha`` at every query before the new row is added:
    with 0.2 about three queries count, whatever the prompt's length. Reads 2407.20485.

    Reading a prompt costs one pass over the rows that count, in blocks; a generated token costs
    one more row. Memory: budget times two times key-value heads times head dim, a layer.

    Example:
        >>> A2SF(budget=256, recent=64, sink=4, alpha=0.3).split(256)
        Split(sink=4, select=188, recent=64)
    """

    name: ClassVar[str] = "a2sf"
    settings_class: ClassVar[type[Config]] = A2SFConfig

    def weights(self, real: Tensor, *, prompt: bool) -> Tensor | None:
        return forgetting_weights(real, self.settings.alpha)

    def decay(self, real: Tensor, *, prompt: bool) -> Tensor:
        fade: Tensor = self.settings.alpha ** real.sum(-1).float()
        return fade
