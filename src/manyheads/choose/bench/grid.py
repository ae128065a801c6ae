"""Forward and forward with backward of every mechanism over lengths and directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F

from manyheads.choose.cost import Subject, TensorPool
from manyheads.choose.growth import crossover, fit_exponent
from manyheads.choose.machine import available_memory
from manyheads.choose.predict import can_hold, need_bytes
from manyheads.choose.results import Progress
from manyheads.choose.timing import forward, forward_backward, interleaved
from manyheads.registry import Shape, get_mechanism, list_mechanisms

__all__ = ["DIRECTIONS", "SDPA", "bench_shape", "is_linear", "measure_grid", "summarise"]

SDPA = "sdpa"
DIRECTIONS = ("causal", "bidirectional")
_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
# Of these the exponents are made; torch's attention, which is quadratic, stays below.
_LONG = (16384, 32768)
_QUICK_LENGTHS = (128, 256, 512)
_EXPONENT_FROM = 2048


def bench_shape(length: int, *, is_causal: bool) -> Shape:
    """Return the shape of the benchmark at a length."""
    return Shape(batch=1, heads=8, length=length, head_dim=64, is_causal=is_causal)


def is_linear(name: str) -> bool:
    """Return whether the closed form says that twice the length is about twice the work."""
    mechanism = get_mechanism(name)
    once, twice = (
        mechanism.flops(bench_shape(n, is_causal=mechanism.causal)) for n in (8192, 16384)
    )
    return twice < 2.5 * once


def measure_grid(*, quick: bool, seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Time everything and return a row for each mechanism, direction, measure and length."""
    names = [n for n in list_mechanisms() if n != "softmax"]
    lengths = _QUICK_LENGTHS if quick else (*_LENGTHS, *_LONG)
    groups = [(n, d, w) for n in lengths for d in DIRECTIONS for w in ("forward", "train")]
    # Work grows at least in proportion to the length: shares of the bar.
    weights = [n ** (1.0 if n in _LONG else 1.5) for n, _, _ in groups]
    rows: list[dict[str, Any]] = []
    for index, (length, direction, what) in enumerate(groups):
        done, whole = sum(weights[:index]), sum(weights)

        def show(
            share: float, *, base: float = done, own: float = weights[index], of: float = whole,
            text: str = f"{direction}, {what}, length {length:,}",
        ) -> None:  # fmt: skip
            progress((base + share * own) / of, text)

        rows += _group(names, length, direction, what, quick=quick, seed=seed, show=show)
    return rows


def _group(
    names: list[str],
    length: int,
    direction: str,
    what: str,
    *,
    quick: bool,
    seed: int,
    show: Callable[[float], None],
) -> list[dict[str, Any]]:
    is_causal = direction == "causal"
    shape = bench_shape(length, is_causal=is_causal)
    calls: dict[str, Callable[[], Any]] = {}
    pool = TensorPool()
    show(0.0)
    if length not in _LONG:
        subject = Subject("softmax", shape, seed=seed, pool=pool)
        make = forward if what == "forward" else forward_backward
        calls[SDPA] = make(
            F.scaled_dot_product_attention,
            *(subject.inputs[k] for k in ("query", "key", "value")),
            is_causal=is_causal,
        )
    for name in names:
        mechanism = get_mechanism(name)
        fits = mechanism.causal if is_causal else mechanism.bidirectional
        if not fits or (length in _LONG and not is_linear(name)):
            continue
        if can_hold(2 * need_bytes(what, mechanism, shape, None), available_memory()):
            calls[name] = Subject(name, shape, seed=seed, pool=pool).call(what)
    timings = interleaved(
        calls,
        repeats=3 if quick else (11 if length <= 2048 else 7 if length <= 4096 else 5),
        min_sample_seconds=1e-3 if quick else 1e-2,
        progress=lambda done, total: show(done / total),
    )
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    base = timings.get(SDPA)
    return [
        {
            "mechanism": name,
            "direction": direction,
            "what": what,
            "length": length,
            **timing.to_dict(),
            "times_faster_than_sdpa": None if base is None else base.median / timing.median,
        }
        for name, timing in timings.items()
    ]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return exponent and crossover for each mechanism, direction and measure."""
    series: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        key = (row["mechanism"], row["direction"], row["what"])
        series.setdefault(key, {})[row["length"]] = row["median"]
    found = []
    for (name, direction, what), times in series.items():
        base = series.get((SDPA, direction, what), {})
        both = sorted(times.keys() & base.keys())
        a, b = [times[n] for n in both], [base[n] for n in both]
        tail = [n for n in sorted(times) if n >= _EXPONENT_FROM]
        fit = fit_exponent(tail, [times[n] for n in tail]) if len(tail) > 1 else (None, None)
        found.append(
            {
                "mechanism": name,
                "direction": direction,
                "what": what,
                "exponent": fit[0],
                "exponent_r2": fit[1],
                "exponent_lengths": tail,
                "crossover": crossover(both, a, b) if both and name != SDPA else None,
                "faster_everywhere": name != SDPA
                and bool(both)
                and all(x < y for x, y in zip(a, b, strict=True)),
                "times_faster": {str(n): y / x for n, x, y in zip(both, a, b, strict=True)},
            }
        )
    return found
