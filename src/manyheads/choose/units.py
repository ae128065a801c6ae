"""Numbers for people: seconds, bytes, FLOPs and lengths with three figures and a unit."""

from __future__ import annotations

import math

__all__ = ["show_bytes", "show_count", "show_rate", "show_seconds"]


def show_seconds(seconds: float | None) -> str:
    """Return "12.3 ms", "1.23 s", "4 min 05 s"; "-" for None."""
    if seconds is None:
        return "-"
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor * 0.9995:
            return f"{_figures(seconds / factor)} {unit}"
    return f"{_figures(seconds / 1e-6)} µs"


def show_bytes(count: float | None) -> str:
    """Return "1.23 MB" (powers of 1000); "-" for None."""
    if count is None:
        return "-"
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor * 0.9995:
            return f"{_figures(count / factor)} {unit}"
    return f"{round(count)} B"


def show_count(count: float | None) -> str:
    """Return "1.23 G" for large counts of FLOPs or parameters; "-" for None."""
    if count is None:
        return "-"
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= factor * 0.9995:
            return f"{_figures(count / factor)} {unit}"
    return str(round(count))


def show_rate(flops: float | None) -> str:
    """Return "95.1 GFLOP/s"; "-" for None."""
    return "-" if flops is None else f"{show_count(flops)}FLOP/s"


def _figures(value: float) -> str:
    """Three significant figures, without an exponent."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{digits}f}"
