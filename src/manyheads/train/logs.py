"""Where a run's figures go: metrics.csv, TensorBoard, and the terminal."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any, Self

from manyheads.train.files import TEMPORARY, replace_file

__all__ = ["MetricsLog", "Recorder", "Terminal"]


class MetricsLog:
    """metrics.csv, one row a call, and TensorBoard events where wanted.

    A run that goes on from a checkpoint drops the rows that it will write again, so the file is
    that of an uninterrupted run but for the times.

    Args:
        folder: of the run.
        figures: columns of an evaluation.
        others: columns of training.
        step: rows of later steps are dropped.
        evaluated: so are evaluations of later steps than this.
        tensorboard: also write events.
    """

    def __init__(
        self,
        folder: Path,
        figures: tuple[str, ...],
        others: tuple[str, ...],
        *,
        step: int,
        evaluated: int,
        tensorboard: bool,
    ) -> None:
        self.path, self.columns = folder / "metrics.csv", ("step", *others, *figures)
        kept = []
        for row in self._read():
            last = evaluated if row[figures[0]] else step
            if int(row["step"]) <= last:
                kept.append(row)
        temporary = folder / f"{TEMPORARY}metrics.csv"
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(kept)
        replace_file(temporary, self.path)
        self._file = self.path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, self.columns, restval="")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder), purge_step=step + 1)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        # The last row of a run that was killed may be cut short.
        return [r for r in rows if tuple(r) == self.columns and None not in r.values()]

    def row(self, step: int, values: dict[str, float]) -> None:
        """Write one row; it is in the file when this returns."""
        self._writer.writerow({"step": step, **values})
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


class Terminal:
    """A progress bar on the standard error stream, and lines that stay.

    Where that is no terminal, only the lines are printed.
    """

    def __init__(self, *, steps: int, done: int, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, quiet=not shown, highlight=False)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("", total=steps, completed=done, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int, text: str | None = None) -> None:
        """Show a step, and a new text beside the bar."""
        fields: dict[str, Any] = {} if text is None else {"text": text}
        self._bar.update(self._task, completed=step, **fields)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, soft_wrap=True)


class Recorder:
    """Both of the above for one part of a run, and its speed.

    Args:
        log: None in processes that do not write.
        terminal: shows nothing in those.
        unit: name and number of what one step reads, such as ("tokens", 8192).
        step: steps done before this part.
        seconds: wall time of the parts before.
    """

    def __init__(
        self,
        log: MetricsLog | None,
        terminal: Terminal,
        *,
        unit: tuple[str, int],
        step: int,
        seconds: float,
    ) -> None:
        self._log, self._terminal, self._unit = log, terminal, unit
        self._begun = time.perf_counter() - seconds
        self._since, self._step = time.perf_counter(), step

    def seconds(self) -> float:
        """Return the wall time of the run."""
        return time.perf_counter() - self._begun

    def trained(self, step: int, values: dict[str, float]) -> None:
        """Record a mean over the steps since the last record, with the speed of training alone."""
        now = time.perf_counter()
        speed = (step - self._step) * self._unit[1] / max(now - self._since, 1e-9)
        self._since, self._step = now, step
        times = {"seconds": round(self.seconds(), 3), f"{self._unit[0]}_per_s": round(speed, 1)}
        if self._log is not None:
            self._log.row(step, {**values, **times})
        text = f"loss {values['loss']:.3f}  {speed:,.0f} {self._unit[0]}/s"
        self._terminal.update(step, text)

    def evaluated(self, step: int, values: dict[str, float], took: float) -> None:
        """Record an evaluation, which took so many seconds."""
        self._since += took
        if self._log is not None:
            self._log.row(step, values)
        shown = "  ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in values.items())
        self._terminal.say(f"step {step:>6}  {shown}  after {_clock(self.seconds())}")

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
    )
