"""What the benchmark aims at, and whether it was met."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["TARGETS", "Target", "judge"]

_LONGEST = "8192"
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


def _one(summary: Summary, name: str, direction: str, what: str = "train") -> dict[str, Any]:
    key = (name, direction, what)
    rows = (s for s in summary if (s["mechanism"], s["direction"], s["what"]) == key)
    return next(rows, {})


def _faster(name: str, direction: str, bound: float) -> Target:
    return Target(
        what=f"{name}, {direction}, forward and backward at 8,192: times as fast as SDPA",
        bound=bound,
        at_least=True,
        unit="x",
        measure=lambda s, _: _one(s, name, direction).get("times_faster", {}).get(_LONGEST),
    )


def _crosses(name: str, direction: str, bound: int) -> Target:
    def measure(summary: Summary, _: dict[str, Any]) -> float | None:
        found = _one(summary, name, direction)
        if _LONGEST not in found.get("times_faster", {}):
            return None
        return math.inf if found["crossover"] is None else found["crossover"]

    return Target(
        what=f"{name}, {direction}: faster than SDPA, forward and backward, from length",
        bound=bound,
        at_least=False,
        unit="tokens",
        measure=measure,
    )


def _exponent(name: str, direction: str) -> Target:
    return Target(
        what=f"{name}, {direction}: exponent of time in length, 2k to 32k",
        bound=1.1,
        at_least=False,
        unit="",
        measure=lambda s, _: _one(s, name, direction).get("exponent"),
    )


def _exponent_kept(name: str, direction: str) -> Target:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        found = special.get("memory_kept", {})
        if found.get("lengths", [0])[-1] < 32768:
            return None
        rows = (r for r in found["rows"] if (r["mechanism"], r["direction"]) == (name, direction))
        return next((r["exponent"] for r in rows), None)

    return Target(
        what=f"{name}, {direction}: the same where the process keeps freed memory",
        bound=1.1,
        at_least=False,
        unit="",
        measure=measure,
    )


_LINEAR = (
    ("gla", "causal"),
    ("flow", "bidirectional"),
    ("flow", "causal"),
    ("norm", "bidirectional"),
    ("norm", "causal"),
    ("diag", "bidirectional"),
    ("diag", "causal"),
    ("aaren", "causal"),
)


def _gla_reference(_: Summary, special: dict[str, Any]) -> float | None:
    found = special.get("gla_against_reference", {})
    return found["train"]["times_faster"] if found.get("length") == 2048 else None


def _aaren(figure: str) -> Callable[[Summary, dict[str, Any]], float | None]:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        row = next((r for r in special["streaming"] if r["mechanism"] == "aaren"), None)
        if row is None or row["tokens"][1] != 10_000:
            return None
        if figure == "bytes":
            return row["state_bytes"][1] / row["state_bytes"][0]
        return row["time_ratio"]

    return measure


def _urpe(_: Summary, special: dict[str, Any]) -> float | None:
    rows = [r for r in special.get("urpe_against_bias", ()) if r["length"] >= 1024]
    return max((r["ratio"] for r in rows), default=None)


def _urpe_memory(_: Summary, special: dict[str, Any]) -> float | None:
    found = special.get("urpe_inference_memory", {})
    if found.get("length") != 8192:
        return None
    rows = [found[d] for d in ("bidirectional", "causal") if d in found]
    return max(r["peak_bytes"] / r["square_bytes"] for r in rows)


def _lean(figure: str) -> Callable[[Summary, dict[str, Any]], float | None]:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        found = special.get("lean_against_sdpa", {})
        return found.get(figure) if found.get("lengths", [0])[-1] == 262_144 else None

    return measure


_LEAN = tuple(
    Target(what=f"lean, a token {words}", bound=bound, at_least=True, unit="x",
           measure=_lean(figure))
    for words, bound, figure in (
        ("at 4k to 256k, mean: times as fast as SDPA with groups", 6, "over_sdpa"),
        ("at 4k to 256k, mean: times as fast as SDPA on a group's rows", 1, "over_stacked"),
        ("from 64k on, least: bytes a second over those of a plain read", 0.7,
         "least_bandwidth_share"),
        ("from 64k on, one key-value head: all threads over one", 1.6, "threads_over_one"),
    )
)  # fmt: skip


TARGETS = (
    _faster("gla", "causal", 6),
    _crosses("gla", "causal", 1024),
    Target(
        what="gla, forward and backward at 2,048: times as fast as its definition by the token",
        bound=20,
        at_least=True,
        unit="x",
        measure=_gla_reference,
    ),
    _faster("flow", "bidirectional", 20),
    _crosses("flow", "bidirectional", 512),
    _faster("flow", "causal", 6),
    _faster("norm", "bidirectional", 20),
    _crosses("norm", "bidirectional", 512),
    _faster("norm", "causal", 6),
    _faster("diag", "bidirectional", 25),
    _faster("aaren", "causal", 30),
    Target(
        what="aaren: time of a token after 10,000 over that after 10",
        bound=1.1,
        at_least=False,
        unit="x",
        measure=_aaren("time"),
    ),
    Target(
        what="aaren: bytes of the state after 10,000 tokens over those after 10",
        bound=1.0,
        at_least=False,
        unit="x",
        measure=_aaren("bytes"),
    ),
    Target(
        what="urpe, 1,024 to 4,096: time, forward and backward, over SDPA with a bias",
        bound=2,
        at_least=False,
        unit="x",
        measure=_urpe,
    ),
    Target(
        what="urpe at 8,192 without gradients: peak memory over one (B, H, N, N) tensor",
        bound=0.25,
        at_least=False,
        unit="x",
        measure=_urpe_memory,
    ),
    *_LEAN,
    *(make(name, way) for name, way in _LINEAR for make in (_exponent, _exponent_kept)),
)


def judge(summary: Summary, special: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each target with what was measured and whether it was met.

    ``met`` None: not measured in this run; False without a figure: it never happened.
    """
    found = []
    for target in TARGETS:
        value = target.measure(summary, special)
        if value is None:
            met = None
        else:
            met = value >= target.bound if target.at_least else value <= target.bound
        row = asdict(target)
        row.pop("measure")
        if value is not None and not math.isfinite(value):
            value = None
        found.append(row | {"measured": value, "met": met})
    return found
