"""`choose` from the first check to the report: what is wrong is said before any work."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from manyheads.choose.cost import bind, draw_inputs
from manyheads.choose.grid import GridSubject
from manyheads.choose.machine import (
    available_memory,
    machine_facts,
    matmul_rate,
    set_threads,
    usable_cores,
)
from manyheads.choose.measure import measure_cost
from manyheads.choose.predict import can_hold, input_bytes, largest_length, need_bytes
from manyheads.choose.report import Report
from manyheads.choose.results import Progress, Results
from manyheads.choose.units import show_bytes
from manyheads.choose.workload import REFERENCE, Workload
from manyheads.data import TextSource, split_text
from manyheads.models.language.pattern import parse_pattern
from manyheads.registry import Shape, get_mechanism

__all__ = ["check_folder", "choose", "default_threads", "measure", "prepare"]

# Share of the budget for the cost side where there is a quality side too, and of the progress.
_COST_SHARE = 0.3
_LEAST_TEXT = 4096
_LEAST_QUALITY = 0.2
_SMALL_SIDE = 8


def choose(
    workload: Workload,
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure which mechanism fits a workload on this machine.

    Args:
        workload: sizes, direction, phases, text, budget; ``manyheads.choose.Workload``.
        out: folder where every figure is kept as soon as it is measured, and where an
            interrupted run is resumed; None: nothing is written.
        fresh: measure anew what the folder already holds.
        progress: called as ``progress(share, text)`` with the share done, 0 to 1.

    Returns:
        The report: ``report.best``, ``report.table``, ``report.save(folder)``, ``str(report)``.

    Raises:
        ValueError: a workload that cannot be measured, or a folder that cannot be written;
            before any work.
        KeyboardInterrupt: after what was measured is kept in ``out``.

    Example:
        >>> report = manyheads.choose(Workload(length=2048, budget=60))
        >>> report.best
    """
    with set_threads(workload.threads or default_threads()):
        results = prepare(workload)
        if out is not None:
            results.keep_in(check_folder(Path(out)), fresh=fresh)
        measure(results, progress=progress)
    return Report(results)


def default_threads() -> int:
    """Return as many threads as torch decides, and no more than this process may use."""
    return min(torch.get_num_threads(), usable_cores())


def check_folder(folder: Path) -> Path:
    """Make the folder, and make sure that a file can be written there.

    Raises:
        ValueError: it cannot be made or written.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"out {str(folder)!r} cannot be written ({error.strerror or error}): "
            "give another folder with --out"
        ) from None
    return folder


def prepare(workload: Workload) -> Results:
    """Check everything that can be checked without measuring, and return empty results.

    Raises:
        ValueError: unusable text, mechanisms that do not take these shapes, a length that no
            memory holds.
    """
    source = workload.load_data()
    if isinstance(source, TextSource):
        split_text(source, min_bytes=_LEAST_TEXT)
    workload, notes = _admitted(workload)
    for length in reversed(workload.ladder):
        _check_memory(workload, length)
    results = Results(workload, machine_facts(), source)
    results.notes = notes
    return results


def measure(results: Results, *, progress: Progress | None = None) -> None:
    """Do what is missing: costs, then quality, then the answer; see `choose`."""
    from manyheads.choose.answer import decide

    workload = results.workload
    tell = progress or (lambda share, text: None)
    if results.complete:
        results.answer = decide(results)  # by the rule of today, whatever version measured
        return
    results.begin()
    begin = time.perf_counter()
    try:
        if "matmul_flops" not in results.machine:
            tell(0.0, "matrix products of this machine")
            results.machine["matmul_flops"] = matmul_rate(workload.torch_dtype)
        share = _COST_SHARE if workload.has_quality else 1.0
        measure_cost(
            results,
            seconds=workload.budget * share - (time.perf_counter() - begin),
            progress=lambda done, text: tell(share * done, text),
        )
        if workload.has_quality:
            from manyheads.choose.quality import measure_quality

            # Earlier sessions count; one that was interrupted late still gets to an end.
            spent = sum(s["seconds"] for s in results.sessions) + time.perf_counter() - begin
            measure_quality(
                results,
                seconds=max(workload.budget - spent, workload.budget * _LEAST_QUALITY),
                progress=lambda done, text: tell(share + (1 - share) * done, text),
            )
        results.answer = decide(results)
        results.end("complete")
        tell(1.0, "done")
    except KeyboardInterrupt:
        results.answer = decide(results)
        results.end("interrupted")
        raise
    except BaseException:
        results.end("failed")
        raise


def _admitted(workload: Workload) -> tuple[Workload, list[str]]:
    """Leave out the mechanisms that do not take these shapes; those asked for must."""
    refused: dict[str, str] = {}
    for name in workload.mechanisms:
        reason = _refusal(workload, name)
        if reason is not None:
            refused[name] = reason
    if not refused:
        return workload, []
    if workload.grid is None:
        named = {n for m in workload.mixers for n in parse_pattern(m)}
    else:
        named = set(workload.mixers)
    for name in refused:
        if name in named or name == REFERENCE:
            raise ValueError(f"{name}: {refused[name]}; drop it from --mixers or change the shapes")
    kept = tuple(n for n in workload.candidates if n not in refused)
    notes = [f"{name} is left out: {reason}" for name, reason in refused.items()]
    return workload.replace(mixers=kept), notes


def _refusal(workload: Workload, name: str) -> str | None:
    if workload.grid is not None:
        return _refuses_maps(workload, name, workload.grid)
    mechanism = get_mechanism(name)
    if "decode" in workload.does and (mechanism.step is None or mechanism.update is None):
        return "it has no form that decodes token by token"
    shape = Shape(
        heads=workload.heads,
        kv_heads=workload.kv_heads,
        head_dim=workload.head_dim,
        length=3,
        is_causal=workload.causal,
    )
    try:
        inputs = draw_inputs(mechanism, shape, dtype=workload.torch_dtype)
        bind(mechanism, workload.causal)(**inputs)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def _refuses_maps(workload: Workload, name: str, grid: tuple[int, int]) -> str | None:
    """Try a small map, because the workload's may be more than the memory holds."""
    rows, columns = (min(side, _SMALL_SIDE) for side in grid)
    subject, shape = GridSubject(name, (rows, columns)), workload.shape(rows * columns)
    try:
        inputs = draw_inputs(subject, shape, dtype=workload.torch_dtype)
        with torch.no_grad():
            subject.build(shape, training=False).to(workload.torch_dtype)(**inputs)
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def _check_memory(workload: Workload, length: int) -> None:
    available = available_memory()
    for phase in workload.does:
        what = "forward" if phase == "prefill" else phase
        need = _least_need(workload, what, length, available)
        if not can_hold(need, available):
            most = largest_length(
                lambda n, w=what: can_hold(_least_need(workload, w, n, available), available),  # type: ignore[misc]
                length,
            )
            raise ValueError(
                f"{_plain(workload, length)} needs at least {show_bytes(need)} of memory for "
                f"phase {phase} with any mechanism, {show_bytes(available)} are available: the "
                f"largest {_plain(workload, _round_down(most), 'that fits is ')}"
            )


def _plain(workload: Workload, length: int, verb: str = "") -> str:
    """Return "length [that fits is ]4096", or "map [that fits is ]56 x 56"."""
    if workload.grid is None:
        return f"length {verb}{length}"
    return f"map {verb}{workload.where(length)}"


def _least_need(workload: Workload, what: str, length: int, available: int) -> int:
    """Return what the least hungry mechanism needs; its inputs alone where they are too much."""
    shape, size = workload.shape(length), workload.element_bytes
    needs = []
    for name in workload.mechanisms:
        mechanism = workload.subject(name)
        inputs = 0 if what == "decode" else input_bytes(mechanism, shape, size)
        fits = can_hold(inputs, available)
        needs.append(need_bytes(what, mechanism, shape, None, size) if fits else inputs)
    return min(needs)


def _round_down(value: int) -> int:
    """Keep two figures: the memory that is free changes from one second to the next."""
    unit = 10 ** max(len(str(value)) - 2, 0)
    return value // unit * unit
