"""H2O: accumulated attention (2306.14048)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from manyheads.compress.a2sf.policy import CachePolicy

__all__ = ["H2O"]


class H2O(CachePolicy):
    """Keep the tokens with the most attention summed over all queries. **Lossy**, no training.

    Half of the budget is for the newest tokens unless ``recent`` says otherwise. The sum favours
    early tokens: :class:`A2SF` is the same with forgetting. Reads 2306.14048.

    Reading a prompt costs one more pass over queries and keys, in blocks.

    Example:
        >>> H2O(budget=100).split(100)
        Split(sink=0, select=50, recent=50)
    """

    name: ClassVar[str] = "h2o"

    def _recent(self, budget: int) -> int:
        return budget // 2

    def weights(self, real: Tensor, *, prompt: bool) -> Tensor | None:
        return real.float()

    def decay(self, real: Tensor, *, prompt: bool) -> Tensor:
        return real.new_ones((), dtype=real.float().dtype)
