"""StreamingLLM: first and newest tokens, positions counted inside the cache (2309.17453)."""

from __future__ import annotations

from typing import ClassVar

from manyheads.compress.a2sf.sink_recent import SinkRecent

__all__ = ["StreamingLLM"]


class StreamingLLM(SinkRecent):
    """Keep the first ``sink`` and the newest tokens, and close the gap between them. **Lossy**.

    Positions count inside the cache: the first tokens' keys are turned so that they lie right
    before the newest ones. Distances stay below the budget, so that text may go on past the
    length that a model was trained at. Rotary models alone. Reads 2309.17453.

    Example:
        >>> StreamingLLM(budget=64, sink=2).split(64)
        Split(sink=2, select=0, recent=62)
    """

    name: ClassVar[str] = "streaming"
    rotates: ClassVar[bool] = True
