"""Rows and summaries of cost from the units that were measured; what is missing is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, Literal

from manyheads.choose.growth import crossover, fit_exponent
from manyheads.choose.predict import (
    predict_peak_bytes,
    predict_seconds,
    state_bytes_closed,
)
from manyheads.choose.results import CostRow, Results, Summary
from manyheads.choose.workload import REFERENCE

__all__ = ["cost_rows", "known", "measures", "summaries", "unit_key"]

_TIMES = ("forward", "train", "decode")


def unit_key(what: str, mechanism: str, length: int) -> str:
    """Return the key of a cost unit: memory, forward, train or decode of a mechanism at N."""
    return f"cost/{what}/{mechanism}/{length}"


def measures(phases: Iterable[str]) -> tuple[str, ...]:
    """Return what is measured for these phases, in the order it is measured at each length."""
    phases = set(phases)
    return (
        "memory",
        "forward",
        *(["train"] if "train" in phases else []),
        *(["decode"] if "decode" in phases else []),
    )


def known(results: Results, what: str, mechanism: str, figure: str = "median") -> dict[int, Any]:
    """Return a measured figure by length."""
    found = {}
    for length in results.workload.ladder:
        unit = results.units.get(unit_key(what, mechanism, length))
        if unit is not None and unit.status == "measured" and unit.figures.get(figure) is not None:
            found[length] = unit.figures[figure]
    return found


def cost_rows(results: Results) -> list[CostRow]:
    """Return a row a candidate and length; hybrids are the averages of their layers."""
    w = results.workload
    rows = {(n, at): _row(results, n, at) for n in w.mechanisms for at in w.ladder}
    return [
        _hybrid_row(mixer, [rows[n, at] for n in _layers(mixer)])
        if mixer in w.hybrids
        else rows[mixer, at]
        for mixer in w.candidates
        for at in w.ladder
    ]


def _row(results: Results, name: str, length: int) -> CostRow:
    w = results.workload
    mechanism = w.subject(name)
    shape = w.shape(length)
    values: dict[str, Any] = {"flops": mechanism.flops(shape)}
    predicted: list[str] = []
    reasons: list[str] = []
    rate = results.machine.get("matmul_flops") or 1e10

    def take(field: str, what: str, figure: str, predict: Callable[[], Any]) -> None:
        unit = results.units.get(unit_key(what, name, length))
        if unit is not None and unit.figures.get(figure) is not None:
            values[field] = unit.figures[figure]
            if unit.status == "measured":
                return
        else:
            values[field] = predict()
        predicted.append(field)
        if unit is not None and unit.reason is not None and unit.reason not in reasons:
            reasons.append(unit.reason)

    def seconds(what: str) -> Callable[[], float]:
        times = known(results, what, name)
        return lambda: predict_seconds(what, mechanism, shape, times, rate=rate)

    for what in measures(w.does):
        if what == "memory":
            continue
        take(f"{what}_seconds", what, "median", seconds(what))
        unit = results.units.get(unit_key(what, name, length))
        if unit is not None and unit.status == "measured":
            values[f"{what}_lower"] = unit.figures["lower"]
            values[f"{what}_upper"] = unit.figures["upper"]
    of = "train" if "train" in w.does else "forward"
    peaks = known(results, "memory", name, "peak_bytes")
    take(
        "peak_bytes", "memory", "peak_bytes",
        lambda: predict_peak_bytes(of, mechanism, shape, peaks, w.element_bytes),
    )  # fmt: skip
    if mechanism.update is not None and w.causal:
        take(
            "state_bytes", "memory", "state_bytes",
            lambda: state_bytes_closed(mechanism, shape, w.element_bytes),
        )  # fmt: skip
    memory = results.units.get(unit_key("memory", name, length))
    if memory is not None:
        values["counted_flops"] = memory.figures.get("counted_flops")
    if "forward_seconds" not in predicted and results.machine.get("matmul_flops"):
        values["share"] = values["flops"] / values["forward_seconds"] / rate
    return CostRow(
        mixer=name, length=length, predicted=tuple(predicted), reasons=tuple(reasons), **values
    )


def _layers(mixer: str) -> tuple[str, ...]:
    from manyheads.models.language.pattern import parse_pattern

    return parse_pattern(mixer)


def _hybrid_row(mixer: str, parts: list[CostRow]) -> CostRow:
    def mean(field: str) -> Any:
        numbers = [getattr(p, field) for p in parts]
        return None if None in numbers else fmean(numbers)

    def largest(field: str) -> Any:
        numbers = [getattr(p, field) for p in parts]
        return None if None in numbers else max(numbers)

    values: dict[str, Any] = {f"{t}_{k}": mean(f"{t}_{k}") for t in _TIMES for k in _SPREADS}
    values["share"] = None
    if values["forward_seconds"] and all(p.share for p in parts):
        # The layers' rates, weighted by the time that each takes.
        whole = sum(p.forward_seconds or 0.0 for p in parts)
        values["share"] = sum((p.share or 0) * (p.forward_seconds or 0) for p in parts) / whole
    for field in ("state_bytes", "flops", "counted_flops"):
        values[field] = None if mean(field) is None else round(mean(field))
    # One layer works at a time.
    values["peak_bytes"] = largest("peak_bytes")
    return CostRow(
        mixer=mixer,
        length=parts[0].length,
        predicted=tuple(dict.fromkeys(f for p in parts for f in p.predicted)),
        reasons=tuple(dict.fromkeys(r for p in parts for r in p.reasons)),
        **values,
    )


_SPREADS = ("seconds", "lower", "upper")


def summaries(results: Results) -> list[Summary]:
    """Return exponent and crossover of every candidate, from measured times alone."""
    w = results.workload
    what: Literal["forward", "train"] = "train" if "train" in w.does else "forward"
    times = {
        (m, t): _measured(results.cost, m, t) for m in w.candidates for t in ("forward", "train")
    }
    return [
        Summary(
            mixer=m,
            forward_exponent=_exponent(times[m, "forward"]),
            train_exponent=_exponent(times[m, "train"]),
            crossover_in=what,
            **_crossing(m, times[m, what], times[REFERENCE, what]),
        )
        for m in w.candidates
    ]


def _measured(rows: list[CostRow], mixer: str, what: str) -> dict[int, float]:
    field = f"{what}_seconds"
    return {
        r.length: getattr(r, field)
        for r in rows
        if r.mixer == mixer and getattr(r, field) is not None and field not in r.predicted
    }


def _exponent(times: dict[int, float]) -> float | None:
    if len(times) < 2:
        return None
    # Short calls are overhead: the exponent is that of the upper half, three lengths at least.
    lengths = sorted(times)
    upper = lengths[min(len(lengths) // 2, max(len(lengths) - 3, 0)) :]
    return fit_exponent(upper, [times[n] for n in upper])[0]


def _crossing(mixer: str, times: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
    if mixer == REFERENCE:
        return {"crossover_kind": "reference"}
    both = sorted(times.keys() & reference.keys())
    if not both:
        return {"crossover_kind": "unknown"}
    a, b = [times[n] for n in both], [reference[n] for n in both]
    at = crossover(both, a, b)
    if at is None:
        return {"crossover_kind": "never", "up_to": both[-1]}
    everywhere = all(x < y for x, y in zip(a, b, strict=True))
    return {
        "crossover_kind": "everywhere" if everywhere else "at",
        "crossover": float(both[0]) if everywhere else at,
        "up_to": both[-1],
    }
