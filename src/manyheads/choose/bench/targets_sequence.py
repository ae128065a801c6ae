"""Aims of the mechanisms with measurements of their own: long sequences, decoding, kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyheads.choose.bench.target import Summary, Target

__all__ = ["SEQUENCE_TARGETS"]


def _sla(what: str) -> Callable[[Summary, dict[str, Any]], float | None]:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        found = special.get("sla_against_softmax", {})
        if found.get("length") != 32_768:
            return None
        if what == "memory":
            return float(found["largest_tensor_bytes"] / found["square_bytes"])
        return float(found[what]["times_faster"])

    return measure


def _mamba(part: str, what: str, figure: str) -> Callable[[Summary, dict[str, Any]], float | None]:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        found = special.get("mamba_against_transformers", {})
        full = found.get("lengths", {}).get("forward") == 2048
        return found[part][what][figure] if full and part in found else None

    return measure


def _mamba_step(_: Summary, special: dict[str, Any]) -> float | None:
    found = special.get("mamba_against_transformers", {})
    full = found.get("lengths", {}).get("forward") == 2048
    return found["step"]["over_read"] if full else None


_MAMBA = tuple(
    Target(
        what=f"mamba, {part}, {words}: times {better} transformers' loop",
        bound=bound,
        at_least=True,
        unit="x",
        measure=_mamba(part, what, figure),
    )
    for part in ("scan", "mixer")
    for what, words in (("forward", "forward at 2,048"), ("train", "with backward at 256"))
    for figure, better, bound in (
        ("times_faster", "as fast as", 8),
        ("times_less_memory", "less memory than", 10),
    )
)


def _long(form: str, words: str, faster: float, exponent: float) -> tuple[Target, Target]:
    def measure(figure: str) -> Callable[[Summary, dict[str, Any]], float | None]:
        def find(_: Summary, special: dict[str, Any]) -> float | None:
            rows = special.get("long_sequences", ())
            return next(
                (r[figure] for r in rows if (r["form"], r["length"]) == (form, 16384)), None
            )

        return find

    return (
        Target(
            what=f"{words}, forward and backward at 16,384: times as fast as SDPA",
            bound=faster,
            at_least=True,
            unit="x",
            measure=measure("times_faster"),
        ),
        Target(
            what=f"{words}: exponent of time in length, 4k to 32k",
            bound=exponent,
            at_least=False,
            unit="",
            measure=measure("exponent"),
        ),
    )


def _landmark_decode(_: Summary, special: dict[str, Any]) -> float | None:
    found = special.get("landmark_decode", {})
    return found["times_faster"] if found.get("cached") == 65536 else None


def _landmark_training(_: Summary, special: dict[str, Any]) -> float | None:
    found = special.get("landmark_training", {})
    return found["ratio"] if found.get("length") == 4096 else None


def _decode(
    name: str, figure: str, words: str, bound: float, *, batch: int, at_least: bool
) -> Target:
    def measure(_: Summary, special: dict[str, Any]) -> float | None:
        rows = (r for r in special.get("model_decode", ()) if r["contexts"][1] == 8192)
        found = (r[figure] for r in rows if (r["mechanism"], r["batch"]) == (name, batch))
        return next(found, None)

    return Target(
        what=f"{name}, a token of 12 layers behind 8,192, batch {batch}: {words}",
        bound=bound,
        at_least=at_least,
        unit="x",
        measure=measure,
    )


_THAN_CACHE = "times as fast as softmax with a cache"
_THAN_LEAN = "times as fast as softmax by lean"
_CONTEXT = "time over that behind 1,024"
_DECODE = (
    *(
        _decode(name, "times_faster", _THAN_CACHE, 5, batch=batch, at_least=True)
        for name in ("gla", "mamba", "aaren")
        for batch in (1, 4)
    ),
    *(
        _decode(name, "times_faster_than_lean", _THAN_LEAN, 2, batch=batch, at_least=True)
        for name in ("gla", "mamba", "aaren")
        for batch in (1, 4)
    ),
    *(
        _decode(name, "context_ratio", _CONTEXT, 1.3, batch=1, at_least=False)
        for name in ("gla", "mamba", "aaren")
    ),
)


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


SEQUENCE_TARGETS = (
    *_LEAN,
    *(
        Target(
            what=f"sla, 5 % of the blocks, {what} at 32,768, a head of 128: times as fast as SDPA",
            bound=bound,
            at_least=True,
            unit="x",
            measure=_sla(what),
        )
        for what, bound in (("forward", 15.0), ("backward", 6.8))
    ),
    Target(
        what="sla at 32,768, forward and backward: largest tensor over one N x N tensor",
        bound=1 / 128,
        at_least=False,
        unit="x",
        measure=_sla("memory"),
    ),
    *_MAMBA,
    Target(
        what="mamba: a token of the block over a plain read of its weights and state",
        bound=2,
        at_least=False,
        unit="x",
        measure=_mamba_step,
    ),
    *_long("routing strict", "routing, strict, causal, clusters and window sqrt(N)", 8, 1.6),
    *_long("routing top", "routing, top, causal, clusters and window sqrt(N)", 8, 1.6),
    *_long("orchid", "orchid, 256 channels", 20, 1.2),
    Target(
        what="landmark, a token that fetches 4 blocks of 50 of 65,536: times as fast as SDPA",
        bound=10,
        at_least=True,
        unit="x",
        measure=_landmark_decode,
    ),
    Target(
        what="landmark, forward and backward at 4,096: time over causal SDPA",
        bound=2.5,
        at_least=False,
        unit="x",
        measure=_landmark_training,
    ),
    *_DECODE,
)
