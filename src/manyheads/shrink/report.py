"""What a shrink found: a table, report.json, report.html and the picture of size and latency."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from manyheads.choose.table import text_table
from manyheads.choose.units import show_bytes, show_count
from manyheads.shrink.measure import Measured

__all__ = ["Report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 0 auto;
  padding: 1.2rem; } h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; }
.answer { border-left: 5px solid #0072B2; background: #F3F8FC; padding: .8rem 1.1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #888; }
td { border-bottom: 1px solid #e5e5e5; } tr.best td { background: #F3F8FC; font-weight: 600; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; }
"""


@dataclass(kw_only=True)
class Report:
    """Everything that was measured, the original first.

    Attributes:
        model: what was asked for.
        rows: figures of the original and of each result.
        data: what was calibrated by and judged on.
        machine: processor, threads, versions.
        plans: what was decided for the result, step by step.
        chosen: name of the row that was written or is recommended; None where none meets.
        budget: what was asked of a search, "" without one.
        loads: how the result is loaded.
        notes: what a reader must know.
    """

    model: str
    rows: list[Measured]
    data: dict[str, Any]
    machine: dict[str, Any]
    plans: list[dict[str, Any]] = field(default_factory=list)
    chosen: str | None = None
    budget: str = ""
    loads: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def original(self) -> Measured:
        return self.rows[0]

    def share(self, row: Measured, what: str) -> float:
        """Return a row's figure as a share of the original's; of "quality", the loss."""
        if what == "quality":
            return row.quality.loss_from(self.original.quality)
        name = {"parameters": "parameters", "bytes": "weight_bytes", "latency": "forward_ms"}[what]
        return getattr(row, name) / max(getattr(self.original, name), 1e-12)

    def table(self) -> str:
        """Return the figures as aligned text."""
        header, rows = self._cells()
        return text_table(header, rows, mark=self.chosen)

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        first = self.original
        header = ["model", "parameters", "weights", "KV/token", "MACs", "forward", "token"]
        caches = any(r.quality.cache_bytes is not None for r in self.rows)
        if caches:
            header.insert(4, "cache")
        header += [first.quality.name, "lost"]
        rows = []
        for row in self.rows:
            rows.append(
                [
                    row.name,
                    _with_share(show_count(row.parameters), row.parameters, first.parameters),
                    _with_share(show_bytes(row.weight_bytes), row.weight_bytes, first.weight_bytes),
                    show_bytes(row.kv_bytes) if row.kv_bytes else "-",
                    "-" if row.macs is None else show_count(row.macs),
                    _with_share(f"{row.forward_ms:.3g} ms", row.forward_ms, first.forward_ms),
                    "-" if row.token_ms is None else f"{row.token_ms:.3g} ms",
                    f"{row.quality.value:.4f}",
                    "-" if row is first else f"{100 * self.share(row, 'quality'):.1f} %",
                ]
            )
            if caches:
                held, whole = row.quality.cache_bytes or 0, first.quality.cache_bytes or 0
                rows[-1].insert(4, _with_share(show_bytes(held), held, whole))
        return header, rows

    def answer(self) -> str:
        """Return one sentence: what came out."""
        if self.chosen is None:
            near = self.nearest()
            return (
                f"No setting meets {self.budget}. The nearest is {near.name!r}: "
                f"{self._in_words(near)}."
            )
        row = next(r for r in self.rows if r.name == self.chosen)
        start = "Recommended" if self.budget else "Result"
        return f"{start}: {row.name!r}: {self._in_words(row)}."

    def nearest(self) -> Measured:
        """Return the row that comes nearest to the budget."""
        what = self.budget.partition("=")[0]
        return min(self.rows[1:], key=lambda r: self.share(r, what))

    def _in_words(self, row: Measured) -> str:
        lost = 100 * self.share(row, "quality")
        return (
            f"{100 * self.share(row, 'parameters'):.1f} % of the parameters, "
            f"{100 * self.share(row, 'bytes'):.1f} % of the bytes, "
            f"{100 * self.share(row, 'latency'):.0f} % of the time, {self._cache_share(row)}"
            f"{row.quality.name} {row.quality.value:.4f} "
            f"({'lost' if lost >= 0 else 'won'} {abs(lost):.1f} %)"
        )

    def _cache_share(self, row: Measured) -> str:
        held, whole = row.quality.cache_bytes, self.original.quality.cache_bytes
        return f"{100 * held / whole:.0f} % of the cache, " if held is not None and whole else ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "answer": self.answer(),
            "chosen": self.chosen,
            "budget": self.budget,
            "loads": self.loads,
            "rows": [r.to_dict() for r in self.rows],
            "data": self.data,
            "machine": self.machine,
            "plans": self.plans,
            "notes": self.notes,
        }

    def write(self, folder: Path) -> None:
        """Write report.json, report.html and curve.png into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(
            json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8"
        )
        (folder / "curve.png").write_bytes(curve(self))
        (folder / "report.html").write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """Return report.html; its picture lies beside it."""
        header, rows = self._cells()
        head = "".join(f"<th>{escape(h)}</th>" for h in header)
        body = "".join(
            f"<tr{' class=best' if row[0] == self.chosen else ''}>"
            + "".join(f"<td>{escape(c)}</td>" for c in row)
            + "</tr>"
            for row in rows
        )
        notes = "".join(f"<li>{escape(n)}</li>" for n in self.notes)
        facts = "".join(
            f"<li>{escape(str(k))}: {escape(str(v))}</li>"
            for k, v in (*self.data.items(), *self.machine.items())
        )
        loads = f"<h2>Loading the result</h2><pre>{escape(self.loads)}</pre>" if self.loads else ""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Shrinking '
            f"{escape(self.model)}</title><style>{_STYLE}</style></head><body>"
            f"<h1>Shrinking {escape(self.model)}</h1>"
            f'<p class="answer">{escape(self.answer())}</p>'
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            f'</div><img src="curve.png" alt="Quality against weights and against time">'
            f"{loads}<ul>{notes}</ul><h2>Data and machine</h2><ul>{facts}</ul></body></html>\n"
        )


def curve(report: Report) -> bytes:
    """Return a PNG: quality against bytes and against time, one mark a model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Sequence[Any] = figure.subplots(1, 2, sharey=True)
    for axis, name, title in (
        (axes[0], "bytes", "weights, share of the original"),
        (axes[1], "latency", "time of one batch, share of the original"),
    ):
        for number, row in enumerate(report.rows):
            x, y = report.share(row, name), row.quality.value
            is_chosen = row.name == report.chosen
            axis.plot(
                x, y, "s" if number == 0 else "o", color="#D55E00" if is_chosen else "#0072B2",
                markersize=9 if is_chosen or number == 0 else 6,
            )  # fmt: skip
            axis.annotate(
                row.name.replace("llm-drop ", ""), (x, y), fontsize=8, xytext=(5, 5),
                textcoords="offset points",
            )  # fmt: skip
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
        axis.margins(0.18)
    better = "higher" if report.original.quality.higher_is_better else "lower"
    axes[0].set_ylabel(f"{report.original.quality.name} ({better} is better)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _with_share(text: str, value: float, whole: float) -> str:
    share = value / max(whole, 1e-12)
    return text if abs(share - 1) < 5e-4 else f"{text} ({100 * share:.0f} %)"
