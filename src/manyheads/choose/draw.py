"""The pictures of a report: time, memory, quality. matplotlib (extra ``choose``), no display.

One colour and shape a mechanism in all pictures, softmax in near-black; names stand at the
lines' ends.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from manyheads.choose.results import CostRow, Results
from manyheads.choose.units import show_bytes, show_seconds
from manyheads.choose.workload import REFERENCE, Workload
from manyheads.errors import require_extra
from manyheads.registry import list_mechanisms

__all__ = ["Picture", "colour", "draw", "marker"]

# Okabe and Ito's palette, told apart with any colour vision; softmax keeps the dark one.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
# With a shape of its own beside the colour, more mechanisms than colours are told apart.
_MARKERS = "os^Dv<>Pp*h"
_DARK = "#222222"
_NAME_POINTS = 60.0  # about the width of a long name
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "path",
}
_TITLES = {
    "train": "Forward and backward, one layer",
    "forward": "Forward, one layer",
    "decode": "One more token after N",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure: name, what it shows in words, PNG bytes and SVG text."""

    name: str
    alt: str
    png: bytes
    svg: str


def colour(mixer: str, hybrids: Iterable[str] = ()) -> str:
    """Return the colour of a mechanism or hybrid, the same in every picture."""
    place = _place(mixer, hybrids)
    return _DARK if place is None else _PALETTE[place % len(_PALETTE)]


def marker(mixer: str, hybrids: Iterable[str] = ()) -> str:
    """Return the shape of a mechanism's points; of one colour, no two have one shape."""
    place = _place(mixer, hybrids)
    return _MARKERS[0 if place is None else place // len(_PALETTE) % len(_MARKERS)]


def _place(mixer: str, hybrids: Iterable[str]) -> int | None:
    if mixer == REFERENCE:
        return None
    names = [n for n in list_mechanisms() if n != REFERENCE] + sorted(hybrids)
    if mixer not in names:
        from manyheads.attention.grid import list_mixers

        names += [n for n in list_mixers() if n not in names and n != REFERENCE]
    return names.index(mixer) if mixer in names else len(names)


def draw(results: Results) -> list[Picture]:
    """Draw every picture for which there are figures.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra("matplotlib", "choose", "drawing the pictures of a report")
    made = (_time(results), _memory(results), _text(results), _probes(results))
    return [picture for picture in made if picture is not None]


def _time(results: Results) -> Picture | None:
    phases = [p for p in ("train", "forward", "decode") if _series(results, f"{p}_seconds")]
    if "train" in phases and "prefill" not in results.workload.does:
        phases = [p for p in phases if p != "forward"]
    if not phases:
        return None
    with _figure(results, len(phases)) as (figure, axes):
        for axis, phase in zip(axes, phases, strict=True):
            _lines(results, axis, phase)
            axis.set_title(_TITLES[phase])
            _format(axis.yaxis, show_seconds)
        axes[0].set_ylabel("time (median; band: quartiles)")
        alt = "Time against length on logarithmic axes, one line a mechanism: " + "; ".join(
            _TITLES[p].lower() for p in phases
        )
        return _render("time", alt, figure)


def _lines(results: Results, axis: Any, phase: str) -> None:
    series = _series(results, f"{phase}_seconds")
    ends = []
    for mixer, rows in series.items():
        shade = colour(mixer, results.workload.hybrids)
        name = f"{phase}_seconds"
        x = [r.length for r in rows]
        y = [getattr(r, name) for r in rows]
        known = [name not in r.predicted for r in rows]
        last = max((i for i, k in enumerate(known) if k), default=-1)
        style = {
            "color": shade,
            "lw": 2.4 if mixer == REFERENCE else 1.8,
            "marker": marker(mixer, results.workload.hybrids),
        }
        axis.plot(x[: last + 1], y[: last + 1], ms=4, **style)
        if last + 1 < len(x):
            start = max(last, 0)
            axis.plot(x[start:], y[start:], ls=":", ms=4, mfc="white", **style)
        low = [getattr(r, f"{phase}_lower") or getattr(r, name) for r in rows]
        high = [getattr(r, f"{phase}_upper") or getattr(r, name) for r in rows]
        axis.fill_between(x, low, high, color=shade, alpha=0.15, lw=0)
        ends.append((x[-1], y[-1], mixer, shade))
    _log(axis, results.workload)
    if phase != "decode":
        _crossings(results, axis, series, f"{phase}_seconds")
    _labels(axis, ends)


def _crossings(results: Results, axis: Any, series: dict[str, list[CostRow]], name: str) -> None:
    """Ring the places where a mechanism overtakes softmax."""
    reference = {r.length: getattr(r, name) for r in series.get(REFERENCE, [])}
    field = "train" if name == "train_seconds" else "forward"
    for summary in results.summary:
        if summary.crossover_kind != "at" or summary.crossover_in != field or not reference:
            continue
        n = summary.crossover
        below = max((m for m in reference if n is not None and m <= n), default=None)
        above = min((m for m in reference if n is not None and m >= n), default=None)
        if n is None or below is None or above is None:
            continue
        part = 0.0 if above == below else math.log(n / below) / math.log(above / below)
        y = reference[below] ** (1 - part) * reference[above] ** part
        shade = colour(summary.mixer, results.workload.hybrids)
        axis.plot([n], [y], "o", ms=10, mfc="none", mec=shade, mew=1.8, zorder=5)


def _memory(results: Results) -> Picture | None:
    panels = [
        (f, t)
        for f, t in (("peak_bytes", "Peak tensor memory, one layer"),
                     ("state_bytes", "State after N tokens, one layer"))
        if _series(results, f)
    ]  # fmt: skip
    if not panels:
        return None
    with _figure(results, len(panels)) as (figure, axes):
        for axis, (field, title) in zip(axes, panels, strict=True):
            ends = []
            for mixer, rows in _series(results, field).items():
                shade = colour(mixer, results.workload.hybrids)
                x, y = [r.length for r in rows], [getattr(r, field) for r in rows]
                width = 2.4 if mixer == REFERENCE else 1.8
                shape = marker(mixer, results.workload.hybrids)
                axis.plot(x, y, color=shade, marker=shape, ms=4, lw=width)
                ends.append((x[-1], y[-1], mixer, shade))
            _log(axis, results.workload)
            _labels(axis, ends)
            axis.set_title(title)
            _format(axis.yaxis, show_bytes)
        alt = "Memory against length on logarithmic axes, one line a mechanism"
        return _render("memory", alt, figure)


def _text(results: Results) -> Picture | None:
    task = "images" if any(q.task == "images" for q in results.quality) else "text"
    rows = {q.mixer: q for q in results.quality if q.task == task and len(q.curve) > 1}
    if not rows:
        return None
    unit = "tokens" if task == "text" else "images"
    with _figure(results, 2, share_y=True) as (figure, axes):
        for axis, place, title in (
            (axes[0], 0, f"Held-out {task} against training time"),
            (axes[1], 1, f"Held-out {task} against {unit} read"),
        ):
            ends = []
            for mixer, row in rows.items():
                shade = colour(mixer, results.workload.hybrids)
                x, y = [p[place] for p in row.curve], [p[2] for p in row.curve]
                axis.plot(x, y, color=shade, lw=2.4 if mixer == REFERENCE else 1.8)
                ends.append((x[-1], y[-1], mixer, shade))
            axis.set_xscale("log")
            axis.set_title(title)
            _labels(axis, ends)
        axes[0].set_ylabel(
            "bits per byte (less is better)" if task == "text" else "accuracy (more is better)"
        )
        axes[0].set_xlabel("seconds of training")
        axes[1].set_xlabel(unit)
        _format(axes[0].xaxis, lambda v: f"{v:g} s")
        _format(axes[1].xaxis, lambda v: f"{v / 1000:g}k")
        what = "Bits per byte on held-out text" if task == "text" else "Accuracy on held-out images"
        alt = f"{what} against training seconds and {unit}, one line each"
        return _render("quality", alt, figure)


def _probes(results: Results) -> Picture | None:
    tasks = list(
        dict.fromkeys(q.task for q in results.quality if q.task in results.workload.probes)
    )
    if not tasks:
        return None
    with _figure(results, len(tasks), share_y=True) as (figure, axes):
        for axis, task in zip(axes, tasks, strict=True):
            rows = [q for q in results.quality if q.task == task and q.value is not None]
            sized = all(q.state_bytes for q in rows)
            ends = []
            for i, q in enumerate(sorted(rows, key=lambda q: q.mixer)):
                shade = colour(q.mixer, results.workload.hybrids)
                x = q.state_bytes if sized else i
                axis.errorbar(
                    [x], [q.value], yerr=q.spread, ms=7, color=shade, capsize=2,
                    fmt=marker(q.mixer, results.workload.hybrids),
                )  # fmt: skip
                ends.append((x, q.value, q.mixer, shade))
            if sized:
                axis.set_xscale("log")
                axis.set_xlabel("state of the model")
                axis.margins(x=0.3)
                _format(axis.xaxis, show_bytes, room=1.2)
            else:
                axis.set_xticks([])
            if rows and rows[0].chance is not None:
                axis.axhline(rows[0].chance, color="#999999", ls="--", lw=1)
                axis.annotate(
                    "guessing", (0.01, rows[0].chance), xycoords=("axes fraction", "data"),
                    xytext=(0, 3), textcoords="offset points", color="#777777", fontsize=8,
                )  # fmt: skip
            axis.set_ylim(-0.04, 1.06)
            axis.margins(x=0.3)
            axis.set_title(f"{task}: accuracy after equal steps")
            _labels(axis, ends, at_point=True)
        axes[0].set_ylabel("accuracy")
        _format(axes[0].yaxis, lambda v: f"{v:.0%}")
        alt = "Accuracy on small tasks against the size of the state, one point a mechanism"
        return _render("probes", alt, figure)


def _series(results: Results, field: str) -> dict[str, list[CostRow]]:
    """Return the rows that have this figure, by mixer, ascending in length; 0 has no logarithm."""
    found: dict[str, list[CostRow]] = {}
    for row in sorted(results.cost, key=lambda r: r.length):
        if getattr(row, field):
            found.setdefault(row.mixer, []).append(row)
    return found


@contextmanager
def _figure(results: Results, panels: int, *, share_y: bool = False) -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": "manyheads"}):
        height = max(4.4, 1.4 + 0.2 * len(results.workload.candidates))  # a line for each name
        figure = Figure(figsize=(6.0 * panels, height))
        axes = figure.subplots(1, panels, squeeze=False, sharey=share_y)[0]
        yield figure, list(axes)


def _log(axis: Any, workload: Workload) -> None:
    lengths = workload.ladder
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    on_maps = workload.grid is not None
    labels = [workload.where(n).replace(" ", "") if on_maps else _short(n) for n in lengths]
    axis.set_xticks(list(lengths), labels=labels)
    axis.minorticks_off()
    axis.set_xlabel("map (rows x columns)" if on_maps else "length N (tokens)")


def _short(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)


def _format(axis: Any, show: Callable[[float], str], *, room: float = 2.5) -> None:
    """Write ticks with ``show``; between powers of ten only where fewer decades than ``room``."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if low > 0 else 9.0
        subs = (1.0, 2.0, 5.0) if decades < room else (1.0,)
        axis.set_major_locator(LogLocator(base=10, subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: show(v)))
    axis.set_minor_formatter(NullFormatter())


def _labels(
    axis: Any, ends: Sequence[tuple[Any, Any, str, str]], *, at_point: bool = False
) -> None:
    """Write names beside line ends, pushed apart where they would overlap."""
    if not ends:
        return
    figure = axis.figure
    figure.canvas.draw()
    point = figure.dpi / 72
    places = [(axis.transData.transform((x, y)), name, shade) for x, y, name, shade in ends]
    places.sort(key=lambda p: p[0][0])
    groups = [places[:1]]
    for place in places[1:]:
        # Names of far points cannot touch; those at line ends all stand in one column.
        apart = at_point and place[0][0] - groups[-1][-1][0][0] > _NAME_POINTS * point
        if apart:
            groups.append([])
        groups[-1].append(place)
    right = places[-1][0][0]
    for group in groups:
        # Of names at one height the one on the right stays: it would be written over by the other.
        group.sort(key=lambda p: (round(p[0][1]), -p[0][0]))
        heights = _pushed_apart([p[0][1] for p in group], 13.0 * point)
        for ((x, y), name, shade), height in zip(group, heights, strict=True):
            target = axis.transData.inverted().transform((x if at_point else right, y))
            axis.annotate(
                name, target, xytext=(9, (height - y) / point), textcoords="offset points",
                color=shade, va="center", fontsize=9,
                fontweight="bold" if name == REFERENCE else "normal", annotation_clip=False,
            )  # fmt: skip


def _pushed_apart(ascending: list[float], gap: float) -> list[float]:
    """Return heights at least ``gap`` apart, near those given."""
    heights = list(ascending)
    # Push up from below, then shift each run of touching names back around its middle.
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overshoot = heights[-1] - ascending[-1]
    if overshoot > 0:
        start = len(heights) - 1
        while start > 0 and heights[start] - heights[start - 1] <= gap + 1e-6:
            start -= 1
        for i in range(start, len(heights)):
            heights[i] -= overshoot / 2
        for i in range(start - 1, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights


def _render(name: str, alt: str, figure: Any) -> Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=140, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML the namespaces are implied, and the page then names no address at all.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    # The same glyphs are drawn in several pictures of one page: their ids must differ.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Picture(name, alt, png.getvalue(), text)
