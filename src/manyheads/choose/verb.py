"""The verb ``choose``: progress while it measures, the report at the end, Ctrl-C in between."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manyheads.choose.options import ChooseOptions
from manyheads.errors import require_extra

__all__ = ["progress_bar", "run", "stoppable"]

_LINE_EVERY = 5.0


def run(options: ChooseOptions) -> int:
    """Measure, print the report (or the JSON alone) and write the files.

    Returns:
        0, or 130 after Ctrl-C: what was measured is kept and shown, the same command resumes.

    Raises:
        ValueError: wrong input, before any work.
        MissingExtraError: rich or matplotlib is not installed.
    """
    for module in ("rich", "matplotlib"):
        require_extra(module, "choose", "manyheads choose")
    from manyheads.choose.from_options import workload_from_options
    from manyheads.choose.machine import set_threads
    from manyheads.choose.report import Report
    from manyheads.choose.run import check_folder, default_threads, measure, prepare
    from manyheads.choose.table import describe

    workload = workload_from_options(options)
    with set_threads(workload.threads or default_threads()):
        results = prepare(workload)
        folder = check_folder(Path(options.out))
        resumed = results.keep_in(folder, fresh=options.fresh)
        _say(f"workload: {describe(results.workload)}")
        if not options.describes_workload:
            _say("(the built-in example; say what yours is with --length, --heads, --data, ...)")
        if resumed:
            state = "complete; --fresh measures anew" if results.complete else "going on"
            _say(f"{len(results.units)} figures are in {folder} already: {state}")
        report, interrupted = Report(results), False
        try:
            with stoppable() as check, progress_bar() as show:

                def tell(share: float, text: str) -> None:
                    check()
                    show(share, text)

                measure(results, progress=tell)
        except KeyboardInterrupt:
            interrupted = True
    _print(report, folder, as_json=options.json, words=not interrupted)
    if interrupted:
        _say(
            f"\ninterrupted: {len(results.units)} figures are kept in {folder}; "
            f"the same command goes on from there:\n  {_command()}"
        )
        return 130
    if not results.workload.has_quality and results.workload.grid is not None:
        _say("costs only: add --data builtin:digits (or your images) to compare accuracy too")
    elif not results.workload.has_quality and results.workload.causal:
        _say("costs only: add --data builtin:python (or your text) to compare quality too")
    return 0


def _print(report: Any, folder: Path, *, as_json: bool, words: bool) -> None:
    if as_json:
        report.save(folder)
        sys.stdout.write(report.results.to_json())
        sys.stdout.flush()
        return
    print(f"\n{report}\n", flush=True)
    paths = report.save(folder)
    if words:
        print("written: " + ", ".join(str(p) for p in paths), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _command() -> str:
    words = [w for w in sys.argv[1:] if w != "--fresh"]
    return shlex.join(["manyheads", *words])


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Make Ctrl-C certain: what is raised where Python drops exceptions is raised again.

    Yields:
        A function to call often; it raises KeyboardInterrupt if Ctrl-C was pressed.
    """
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # Not the main thread: Ctrl-C is somebody else's.
        yield check
        return
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def progress_bar() -> Iterator[Callable[[float, str], None]]:
    """Show progress on standard error: a bar on a terminal, else a line now and then.

    Yields:
        A function that takes the share done, 0 to 1, and what is going on.
    """
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)


def _lines() -> Callable[[float, str], None]:
    begin = last = time.perf_counter()

    def show(share: float, text: str) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= _LINE_EVERY:
            last = now
            _say(f"{100 * share:3.0f}%  {now - begin:5.0f} s  {text}")

    return show
