"""Tables as plain text: aligned columns, no colour, the same on a terminal and in a file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from manyheads.choose.results import CostRow, QualityRow, Results, Summary, Unit
from manyheads.choose.units import show_bytes, show_count, show_rate, show_seconds
from manyheads.choose.workload import Workload

__all__ = [
    "answer_text",
    "cost_cells",
    "cost_table",
    "describe",
    "gaps",
    "headline",
    "length_table",
    "protocol",
    "text_table",
]

_WIDTH = 100


def text_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, mark: str | None = None
) -> str:
    """Return an aligned table.

    Args:
        header: names of the columns.
        rows: their cells.
        left: how many columns, from the first, stand left; the others stand right.
        mark: the row whose first cell this is gets an arrow.
    """
    cells = [list(map(str, row)) for row in rows]
    arrows = mark is not None and any(row[0] == mark for row in cells)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for row in [list(header), ["-" * w for w in widths], *cells]:
        parts = [
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        arrow = ("> " if row[0] == mark else "  ") if arrows else ""
        lines.append((arrow + "  ".join(parts)).rstrip())
    return "\n".join(lines)


def headline(results: Results) -> str:
    """Return what was measured, on what, in a few lines."""
    w, m = results.workload, results.machine
    lines = [f"workload  {describe(w)}"]
    if results.data is not None:
        name = "text" if w.grid is None else "images"
        lines.append(f"{name:<9} {results.data['name']}: {results.data['description']}")
    lines.append(
        f"machine   {m['cpu']}, {m['threads']} threads, torch {m['torch']}, matrix products "
        f"{show_rate(m.get('matmul_flops'))} ({w.dtype})"
    )
    lines.append(f"protocol  {'; '.join(protocol(results))}")
    return "\n".join(lines)


def protocol(results: Results) -> list[str]:
    """Return how it was measured, in short statements."""
    seconds = sum(s["seconds"] for s in results.sessions)
    return [
        "interleaved rounds, medians with quartiles",
        f"seed {results.workload.seed}",
        f"{show_seconds(seconds)} in {len(results.sessions)} session(s)",
    ]


def describe(workload: Workload) -> str:
    """Return a workload in one line."""
    w = workload
    if w.grid is not None:
        rows, columns = w.grid
        sizes = [f"map {rows} x {columns}", f"{w.dim} channels ({w.heads} heads)"]
        return ", ".join([*sizes, " + ".join(w.does), f"batch {w.batch}", w.dtype])
    heads = f"{w.heads} heads" + (f" ({w.kv_heads} key-value)" if w.kv_heads else "")
    parts = [
        f"length {w.length:,}",
        f"{heads} of {w.head_dim}",
        "causal" if w.causal else "bidirectional",
        " + ".join(w.does),
        f"batch {w.batch}",
        w.dtype,
    ]
    return ", ".join(parts)


def cost_table(results: Results) -> str:
    """Return the costs at the workload's length, one row a candidate, fastest first; what was
    measured of quality stands in a table of its own below, so that both fit a terminal."""
    header, rows, notes = cost_cells(results, quality=False)
    best = None if results.answer is None else results.answer.best
    text = text_table(header, rows, mark=best) + "\n" + _wrap(notes)
    if columns := _quality_columns(results.quality):
        cells = [[row[0], *(column.get(row[0], "-") for _, column in columns)] for row in rows]
        names = ["mixer", *(title for title, _ in columns)]
        text += "\n\n" + text_table(names, cells, mark=best) + "\n" + _quality_note(results)
    return text


def _quality_note(results: Results) -> str:
    counts = [r.parameters for r in results.quality]
    least, most = show_count(min(counts)), show_count(max(counts))
    size = least if least == most else f"{least} to {most}"
    same = f"small models of {size} parameters that differ in their mixers alone; "
    if results.workload.grid is not None:
        return _wrap(same + "accuracy on held-out images (more is better)")
    return _wrap(
        same + "bits per held-out byte (less is better), accuracy of the probes (more is better)"
    )


def cost_cells(results: Results, *, quality: bool = True) -> tuple[list[str], list[list[str]], str]:
    """Return the header, the rows and the notes of the table of costs, as text cells."""
    w = results.workload
    rows = sorted(
        (r for r in results.cost if r.length == w.length), key=lambda r: _main_seconds(r, w)
    )
    summary = {s.mixer: s for s in results.summary}
    columns = [("mixer", lambda r: r.mixer)]
    columns.append(("forward", lambda r: _time(r, "forward")))
    if "train" in w.does:
        columns.append(("fwd+bwd", lambda r: _time(r, "train")))
    if "decode" in w.does:
        columns.append(("a token", lambda r: _time(r, "decode")))
    if w.causal:
        columns.append(("state", lambda r: _guess(r, "state_bytes")))
        if (layers := w.model_layers) is not None:
            columns.append((f"x {layers} layers", lambda r: _guess(r, "state_bytes", layers)))
    columns += [
        ("peak memory", lambda r: _guess(r, "peak_bytes")),
        ("FLOPs", lambda r: show_count(r.flops)),
        ("rate", lambda r: "-" if r.share is None else f"{100 * r.share:.0f}%"),
        ("grows as", lambda r: _exponent(summary.get(r.mixer), w)),
        ("beats softmax", lambda r: _crossing(summary.get(r.mixer))),
    ]
    columns += [
        (title, lambda r, cells=cells: cells.get(r.mixer, "-"))  # type: ignore[misc]
        for title, cells in (_quality_columns(results.quality) if quality else ())
    ]
    notes = [f"one layer without its projections at length {w.where(w.length)}; state per layer"]
    if w.grid is not None:
        notes = [f"one mixer with its projections on {w.where(w.length)}; N: places of the map"]
    if any(r.predicted for r in rows):
        notes.append("~ predicted, not measured")
    notes.append("± half the distance of the quartiles; rate: of this machine's matrix products")
    cells = [[cell(r) for _, cell in columns] for r in rows]
    return [title for title, _ in columns], cells, "; ".join(notes)


def length_table(results: Results) -> str:
    """Return the main time of every candidate at every length."""
    w = results.workload
    what = "train" if "train" in w.does else "forward"
    name = "forward and backward" if what == "train" else "forward"
    mixers = list(dict.fromkeys(r.mixer for r in results.cost))
    cells = {(r.mixer, r.length): _time(r, what, spread=False) for r in results.cost}
    if w.grid is not None:  # few maps, many mixers
        rows = [[m, *(cells.get((m, n), "-") for n in w.ladder)] for m in mixers]
        return f"{name} by map\n" + text_table(["mixer", *map(w.where, w.ladder)], rows)
    rows = [[w.where(n), *(cells.get((m, n), "-") for m in mixers)] for n in w.ladder]
    return f"{name} by length\n" + text_table(["length", *mixers], rows, left=0)


def answer_text(results: Results) -> str:
    """Return the recommendation, the front, the losing cases and what was not measured."""
    lines: list[str] = []
    answer = results.answer
    if answer is not None:
        if answer.best is None:
            lines.append("No recommendation: nothing was measured yet.")
        else:
            partial = " (partial: not everything was measured)" if answer.partial else ""
            lines.append(f"Recommended: {answer.best}{partial}")
            lines.append(_wrap(" ".join(answer.reasons)))
        if answer.ties:
            lines.append(_wrap(f"Within the measured spread of it: {', '.join(answer.ties)}."))
        if answer.front:
            lines.append(_wrap(f"Pareto front: {', '.join(answer.front)}"))
        lines += [_wrap(f"- {text}", "  ") for text in answer.loses]
    if results.notes:
        lines += ["", *(_wrap(note, "  ") for note in results.notes)]
    if results.skipped:
        lines += ["", "Not measured:", *(_wrap(f"- {text}", "  ") for text in gaps(results))]
    return "\n".join(lines)


_WORDS = {"train": "forward and backward", "decode": "one more token"}


def gaps(results: Results) -> list[str]:
    """Say what was not measured: a line for each cause, the reason of the last unit."""
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in results.skipped:
        mixer = unit.key.split("/")[2]
        groups.setdefault((mixer, unit.cause or unit.reason or ""), []).append(unit)
    mixers: dict[str, list[str]] = {}  # what is said of them alike
    for (mixer, _), units in groups.items():
        places: dict[str, list[str]] = {}
        for unit in units:
            kind, what, _, *rest = unit.key.split("/")
            name = _WORDS.get(what, what)
            places.setdefault(name if kind == "cost" else f"quality, {name}", []).extend(rest)
        what = "; ".join(
            _at(name, lengths, results.workload) for name, lengths in sorted(places.items())
        )
        last = f"{units[-1].reason}" if len(units) == 1 else f"the last: {units[-1].reason}"
        mixers.setdefault(f"{what} ({last})", []).append(mixer)
    return [f"{', '.join(names)}, {text}" for text, names in mixers.items()]


def _at(name: str, lengths: list[str], w: Workload) -> str:
    shown = [w.where(int(n)) if n.isdigit() else n for n in lengths]
    if len(shown) > 2:
        shown = [f"{shown[0]} to {shown[-1]}"]
    return f"{name} at {' and '.join(shown)}" if shown else name


def _main_seconds(row: CostRow, workload: Workload) -> float:
    for phase, seconds in (
        ("train", row.train_seconds),
        ("prefill", row.forward_seconds),
        ("decode", row.decode_seconds),
    ):
        if phase in workload.does and seconds is not None:
            return seconds
    return float("inf")


def _time(row: CostRow, what: str, *, spread: bool = True) -> str:
    seconds = getattr(row, f"{what}_seconds")
    if seconds is None:
        return "-"
    if f"{what}_seconds" in row.predicted:
        return f"~{show_seconds(seconds)}"
    text = show_seconds(seconds)
    lower, upper = getattr(row, f"{what}_lower"), getattr(row, f"{what}_upper")
    if not spread or lower is None or upper is None:
        return text
    return f"{text} ±{50 * (upper - lower) / seconds:.0f}%"


def _guess(row: CostRow, field: str, times: int = 1) -> str:
    value = getattr(row, field)
    if value is None:
        return "-"
    return ("~" if field in row.predicted else "") + show_bytes(times * value)


def _exponent(summary: Summary | None, workload: Workload) -> str:
    if summary is None:
        return "-"
    exponent = summary.train_exponent if "train" in workload.does else summary.forward_exponent
    return "-" if exponent is None else f"N^{exponent:.2f}"


def _crossing(summary: Summary | None) -> str:
    if summary is None or summary.crossover_kind == "unknown":
        return "-"
    if summary.crossover_kind == "reference":
        return "is softmax"
    if summary.crossover_kind == "never":
        return f"never up to {summary.up_to:,}"
    if summary.crossover_kind == "everywhere":
        return "everywhere"
    return f"from {summary.crossover:,.0f}"


def _quality_columns(rows: list[QualityRow]) -> list[tuple[str, dict[str, str]]]:
    columns: dict[str, dict[str, str]] = {}
    # Text or images first, at equal seconds before equal tokens; then the probes as they came.
    main = ("text", "images")
    for row in sorted(rows, key=lambda r: (r.task not in main, r.regime != "seconds")):
        if row.task == "text":
            title = f"bits/byte, equal {'time' if row.regime == 'seconds' else row.regime}"
            text = "-" if row.value is None else f"{row.value:.3f}"
        elif row.task == "images":
            title = f"images, equal {'time' if row.regime == 'seconds' else 'steps'}"
            text = "-" if row.value is None else f"{100 * row.value:.1f}%"
        else:
            title, text = row.task, "-" if row.value is None else f"{100 * row.value:.0f}%"
        columns.setdefault(title, {})[row.mixer] = text
    return list(columns.items())


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=indent)
