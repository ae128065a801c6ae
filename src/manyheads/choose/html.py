"""report.html: one page that needs nothing else, and the pictures as PNG files beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from manyheads.choose.draw import Picture, draw
from manyheads.choose.results import QualityRow, Results
from manyheads.choose.table import cost_cells, describe, gaps, protocol
from manyheads.choose.units import show_bytes, show_count, show_rate, show_seconds

__all__ = ["page", "write_report"]

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.answer { border-left: 5px solid #0072B2; background: #F3F8FC; padding: .8rem 1.1rem; }
.answer b { font-size: 1.25rem; } .quiet { color: #555; font-size: .92rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; color: #444; font-weight: 600; }
td { border-bottom: 1px solid #e5e5e5; } tr.best td { background: #F3F8FC; font-weight: 600; }
figure { margin: 1.2rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; } code { background: #f4f4f4; padding: .1rem .3rem; }
li { margin: .2rem 0; }
"""


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html and the pictures; returns the paths.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    pictures = draw(results)
    paths = [folder / "report.html"]
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(page(results, pictures), encoding="utf-8")
    for picture in pictures:
        paths.append(folder / f"{picture.name}.png")
        paths[-1].write_bytes(picture.png)
    return paths


def page(results: Results, pictures: Iterable[Picture]) -> str:
    """Return the page as text: the answer first, then what it rests on."""
    parts = [
        f"<h1>{_title(results)}</h1>",
        f'<p class="quiet">{escape(describe(results.workload))}</p>',
        _answer(results),
        "<h2>Costs</h2>",
        _costs(results),
        *(_picture(p) for p in pictures),
        _quality(results),
        _not_measured(results),
        _protocol(results),
    ]
    body = "\n".join(p for p in parts if p)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_title(results)} {escape(describe(results.workload))}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _title(results: Results) -> str:
    return "Which attention?" if results.workload.grid is None else "Which token mixer?"


def _answer(results: Results) -> str:
    answer = results.answer
    if answer is None or answer.best is None:
        return '<div class="answer">No recommendation: nothing was measured yet.</div>'
    lines = [f"<b>{escape(answer.best)}</b>"]
    if answer.partial:
        lines.append("<i>partial: not everything was measured</i>")
    lines.append(f"<p>{escape(' '.join(answer.reasons))}</p>")
    if answer.ties:
        names = escape(", ".join(answer.ties))
        lines.append(f"<p>Within the measured spread of it: {names}.</p>")
    lines.append(f"<p>Pareto front: {escape(', '.join(answer.front))}</p>")
    if answer.loses:
        lines.append("<p>Where it loses:</p>" + _list(answer.loses))
    return f'<div class="answer">{"".join(lines)}</div>'


def _costs(results: Results) -> str:
    header, rows, notes = cost_cells(results)
    best = None if results.answer is None else results.answer.best
    return _table(header, rows, best) + f'<p class="quiet">{escape(notes)}</p>'


def _quality(results: Results) -> str:
    if not results.quality:
        return ""
    header = ["mixer", "task", "equal", "value", "±", "guessing", "tokens", "training",
              "parameters", "state"]  # fmt: skip
    rows = [
        [
            q.mixer,
            q.task,
            q.regime,
            _value(q, q.value),
            _value(q, q.spread),
            _value(q, q.chance),
            show_count(q.tokens),
            show_seconds(q.seconds),
            show_count(q.parameters),
            show_bytes(q.state_bytes),
        ]
        for q in sorted(results.quality, key=lambda q: (q.task, q.regime, _order(q)))
    ]
    best = None if results.answer is None else results.answer.best
    note = (
        "Text in bits per held-out byte, tasks in accuracy; small models of equal width, layers, "
        "batches and seed, differing in their mixers alone."
    )
    return f'<h2>Quality</h2>{_table(header, rows, best)}<p class="quiet">{note}</p>'


def _order(row: QualityRow) -> float:
    value = float("inf") if row.value is None else row.value
    return value if row.metric == "bits_per_byte" else -value


def _value(row: QualityRow, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if row.metric == "bits_per_byte" else f"{100 * value:.0f}%"


def _not_measured(results: Results) -> str:
    lines = [*results.notes, *gaps(results)]
    return f"<h2>Not measured</h2>{_list(lines)}" if lines else ""


def _protocol(results: Results) -> str:
    m = results.machine
    facts = [
        f"{m['cpu']}, {m['threads']} threads of {m['usable_cores']} cores, "
        f"{show_bytes(m['memory_bytes'])} of memory, {m['system']}",
        f"Python {m['python']}, torch {m['torch']}, numpy {m['numpy']}",
        f"matrix products of this machine: {show_rate(m.get('matmul_flops'))}",
        *protocol(results),
    ]
    if results.data is not None:
        data = results.data
        kind = "text" if results.workload.grid is None else "images"
        facts.append(
            f"{kind}: {data['name']}, {data['description']}, SHA-256 {data['sha256'][:16]}"
        )
    return f"<h2>Machine and protocol</h2>{_list(facts)}"


def _picture(picture: Picture) -> str:
    alt = escape(picture.alt, quote=True)
    svg = picture.svg.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    return f"<figure>{svg}<figcaption>{escape(picture.alt)}.</figcaption></figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], best: str | None) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = ""
    for row in rows:
        mark = ' class="best"' if row[0] == best else ""
        body += f"<tr{mark}>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
