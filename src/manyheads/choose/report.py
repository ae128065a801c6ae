"""The report of one `choose`: the recommendation, the table, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyheads.choose.results import Answer, CostRow, Results
from manyheads.choose.table import answer_text, cost_table, headline, length_table

__all__ = ["Report"]


class Report:
    """What was measured and what follows from it.

    Attributes:
        results: everything, as data.

    Example:
        >>> report = manyheads.choose(Workload(length=2048))
        >>> report.best, [row["mixer"] for row in report.table]
        >>> report.save("out")
    """

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def answer(self) -> Answer | None:
        """The recommendation with its reasons, the front, ties and losing cases."""
        return self.results.answer

    @property
    def best(self) -> str | None:
        """The recommended mixer, None if nothing was measured."""
        return None if self.answer is None else self.answer.best

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dict a candidate at the workload's length: the fields of `CostRow` and `Summary`,
        and for each quality row its value under "<task>_<regime>"."""
        return [self._row(mixer) for mixer in self.results.workload.candidates]

    def _row(self, mixer: str) -> dict[str, Any]:
        results = self.results
        cost = results.cost_row(mixer) or CostRow(mixer=mixer, length=results.workload.length)
        row = cost.to_dict()
        row |= next((s.to_dict() for s in results.summary if s.mixer == mixer), {})
        for quality in results.quality:
            name = f"{quality.task}_{quality.regime}"
            if quality.mixer == mixer:
                row[name] = quality.value
            else:
                row.setdefault(name, None)
        if results.answer is not None:
            row["recommended"] = mixer == results.answer.best
            row["on_front"] = mixer in results.answer.front
        return row

    def save(self, folder: str | Path) -> list[Path]:
        """Write results.json, report.html and the pictures into a folder; returns the paths.

        The pictures and the page need matplotlib (extra ``choose``).

        Raises:
            MissingExtraError: matplotlib is not installed; results.json is written before.
        """
        folder = Path(folder)
        self.results.save(folder)
        from manyheads.choose.html import write_report

        return [folder / "results.json", *write_report(self.results, folder)]

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read what :meth:`save` wrote, or what an interrupted run left.

        Raises:
            ValueError: no results there, or those of another schema.
        """
        return cls(Results.load(Path(folder)))

    def __str__(self) -> str:
        results = self.results
        parts = [headline(results), cost_table(results)]
        if len(results.workload.ladder) > 1:
            parts.append(length_table(results))
        return "\n\n".join([*parts, answer_text(results)])
