"""What a figure of the benchmark aims at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Summary", "Target"]

Summary = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One aim: a figure and its bound.

    Attributes:
        what: the figure, in words.
        bound: what it is to be, at least or at most.
        at_least: which of the two.
        unit: of the figure, "x" for a ratio.
        measure: takes summary and special measurements; None: not measured in this run.
    """

    what: str
    bound: float
    at_least: bool
    unit: str
    measure: Callable[[Summary, dict[str, Any]], float | None]
