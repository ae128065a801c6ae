"""Cards: what a paper is, where it lives here, and its claim as a function that measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Check", "Claim", "Measurement", "Paper"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure of a claim: what was claimed, what was measured here.

    Attributes:
        what: the quantity, in words.
        claimed: what the paper says of it, in words or as a figure.
        measured: the figure measured here.
        unit: unit of ``measured`` ("x" for a ratio, "" for a pure number).
        direction: whether the sign of the effect is as claimed.
        size: whether the size is (within the bound stated in ``bound``).
        bound: the bound that ``size`` was judged by, in words.
    """

    what: str
    claimed: str
    measured: float
    unit: str = ""
    direction: bool
    size: bool
    bound: str = ""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a claim's measurement returned: its checks and the raw figures behind them."""

    checks: tuple[Check, ...]
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """True if every check has the claimed direction and size."""
        return all(c.direction and c.size for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self) | {"holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A paper's headline claim.

    Attributes:
        statement: the claim, in one sentence of ours.
        measure: runs in about a minute on two cores, compares in one run; takes a function that
            is told what is going on (``progress(text)``) and returns the measurement. All
            randomness comes from fixed seeds.
    """

    statement: str
    measure: Callable[[Callable[[str], None]], Measurement]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The card of one paper.

    Attributes:
        slug: file name with - for _.
        title, arxiv: of the paper.
        summary: two or three sentences for a person who decides whether to read on.
        implements: dotted names of what implements it here.
        recipe: the command that trains it, or None.
        claim: its headline claim.
        reconstruction: True where no official code existed.
    """

    slug: str
    title: str
    arxiv: str
    summary: str
    implements: tuple[str, ...]
    recipe: str | None = None
    claim: Claim
    reconstruction: bool = False
