"""Shrinking as a run: open, calibrate, plan, apply, measure side by side, search a budget."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.choose.machine import machine_facts
from manyheads.choose.units import show_bytes
from manyheads.compress.files import Opened, open_model
from manyheads.compress.procedure import Plan, fingerprint, get_procedure
from manyheads.compress.steps import is_stock
from manyheads.shrink.data import Feed, feed_for
from manyheads.shrink.measure import Measured, measure_all
from manyheads.shrink.options import ShrinkOptions, Step, read_budget, read_steps
from manyheads.shrink.quality import Quality, Task, task_for
from manyheads.shrink.report import Report

__all__ = ["Job", "apply_steps", "open_named", "prepare", "search", "shrink"]

Tell = Callable[[float, str], None]


@dataclass(kw_only=True)
class Job:
    """A model with all that it takes to shrink it and to judge the result."""

    options: ShrinkOptions
    opened: Opened
    feed: Feed
    calibration: list[dict[str, Tensor]]
    task: Task
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> nn.Module:
        return self.opened.model


def open_named(name: str, weights: str | None = None) -> Opened:
    """Open a model by folder or name; "builtin:minilm" and "builtin:whisper" are real ones.

    Raises:
        ValueError: no such model.
        MissingExtraError: the package of a builtin model is not installed.
    """
    if name.startswith("builtin:"):
        folders: dict[str, Callable[[], Path]] = {"minilm": _minilm, "whisper": _whisper}
        key = name.removeprefix("builtin:")
        if key not in folders:
            raise ValueError(f"no model {name!r}: there are builtin:minilm and builtin:whisper")
        opened = open_model(folders[key]())
        return Opened(model=opened.model, library=opened.library, name=name, folder=opened.folder)
    return open_model(name, weights=weights)


def _minilm() -> Path:
    from manyheads.data.packages import minilm_folder

    return minilm_folder()


def _whisper() -> Path:
    from manyheads.data.whisper import whisper_folder

    return whisper_folder()


def prepare(options: ShrinkOptions) -> Job:
    """Open the model, read the data, and measure nothing yet.

    Raises:
        ValueError: what is asked for cannot be done with this model or these data.
    """
    opened = open_named(options.model, options.weights)
    feed = feed_for(opened, length=options.length, batch=options.batch)
    source = options.calibrate or options.evaluate
    if not source:
        raise ValueError(
            "give --calibrate: text for a language model, images or recordings for others "
            "(builtin:kjv, builtin:digits, builtin:librivox), or --evaluate"
        )
    notes = []
    if source in ("builtin:lee", "builtin:verses"):
        calibration = _own_texts(feed, source, options.samples)
        notes.append(f"calibrated by the texts of {source}; what is judged is their order")
    else:
        calibration = feed.batches(source, samples=options.samples)
    torch.manual_seed(options.seed)
    task = task_for(
        feed,
        opened.model,
        options.evaluate,
        samples=options.samples,
        fallback=calibration,
        cached=_acts_on_caches(options),
    )
    return Job(
        options=options,
        opened=opened,
        feed=feed,
        calibration=calibration,
        task=task,
        notes=notes,
    )


def _acts_on_caches(options: ShrinkOptions) -> bool:
    if options.plan and Path(options.plan).is_file():
        methods = [Plan.load(options.plan).method]
    else:
        methods = [step.method for step in read_steps(options)]
    return any(get_procedure(m).acts_on_cache for m in methods)


def _own_texts(feed: Feed, source: str, samples: int) -> list[dict[str, Tensor]]:
    if source == "builtin:lee":
        from manyheads.data.lee import load_lee

        return feed.sentences(list(load_lee().background)[:samples])
    from manyheads.data.verses import load_verses

    pairs = list(load_verses("kjv", "web").values())
    return feed.sentences([p[0] for p in pairs[1 :: len(pairs) // samples]][:samples])


def apply_steps(
    job: Job, steps: Sequence[Step], *, tell: Tell | None = None
) -> tuple[nn.Module, list[Plan]]:
    """Return the model after all steps, and their plans."""
    model, plans = job.model, []
    for number, step in enumerate(steps):
        if tell is not None:
            tell(number / len(steps), f"planning {step.method}")
        plan = get_procedure(step.method)(**step.settings).plan(model, job.calibration)
        model = plan.apply(model)
        plans.append(plan)
    return model.eval(), plans


def shrink(job: Job, *, tell: Tell) -> tuple[nn.Module, list[Plan], Report]:
    """Plan (or read the plan), apply, and measure the result beside the original."""
    options = job.options
    if options.plan and Path(options.plan).is_file():
        plans = [Plan.load(options.plan)]
        tell(0.1, f"applying {options.plan}")
        result = plans[0].apply(job.model).eval()
        name = f"{plans[0].method} ({Path(options.plan).name})"
    else:
        steps = read_steps(options)
        result, plans = apply_steps(job, steps, tell=tell)
        name = ", then ".join(s.text for s in steps)
    models = {"original": job.model, name: result}
    qualities = {}
    for label, model in models.items():
        tell(0.5, f"judging {label}")
        qualities[label] = job.task.quality(model)
    rows = _measure(job, models, qualities, tell)
    report = _report(job, rows, plans)
    report.chosen, report.loads = name, loading(result, options.out)
    for plan in plans:
        held, full = (plan.measured.get(k) for k in ("cache_bytes", "cache_bytes_full"))
        if held and full and rows[1].quality.cache_bytes is None:
            report.notes.append(
                f"{plan.method}: the cache held {show_bytes(held)} where the whole is "
                f"{show_bytes(full)} (after the calibration's pieces, the first half as prompt)"
            )
    if rows[1].forward_ms > rows[0].forward_ms:
        report.notes.append(
            f"the result is slower here: {rows[1].forward_ms / rows[0].forward_ms:.2f} times the "
            "original's time for this batch"
        )
    return result, plans, report


def search(job: Job, *, tell: Tell) -> tuple[nn.Module | None, list[Plan], Report]:
    """Try the settings of a method from mild to strong, measure each, recommend one.

    What was measured is kept in ``<out>.search.json``: the same search goes on from there.

    Returns:
        The recommended model (None where no setting meets the budget), its plans, the report.
    """
    options = job.options
    budget = read_budget(options.budget)
    assert budget is not None
    first, *rest = read_steps(options)
    candidates = get_procedure(first.method).candidates(job.model, first.settings)
    if not candidates:
        raise ValueError(f"{first.method} has no settings to search: leave out --budget")
    kept = _Kept(Path(f"{options.out}.search.json") if options.out else None, _key(job))
    base = job.task.quality(job.model)
    rows: list[Measured] = []
    tried: dict[str, list[Step]] = {}
    refused = ""
    for number, settings in enumerate(candidates):
        steps = [Step(first.method, settings), *rest]
        name = ", then ".join(s.text for s in steps)
        tell(number / len(candidates), name)
        found = kept.get(name)
        if found is None:
            try:
                model, _ = apply_steps(job, steps)
            except ValueError as error:  # this model does not bear this setting; others it may
                refused = f"{name} was left out: {error}"
                job.notes.append(refused)
                continue
            qualities = {"original": base, name: job.task.quality(model)}
            found = _measure(job, {"original": job.model, name: model}, qualities, None)
            kept.put(name, found)
        # Runs differ in speed between candidates: time is kept as a share of that run's original.
        rows = rows or found[:1]
        rows.append(_rescaled(found, rows[0]))
        tried[name] = steps
    if not rows:
        raise ValueError(refused)
    report = _report(job, rows, [])
    report.budget = options.budget
    report.chosen = recommend(report, *budget)
    if report.chosen is None:
        return None, [], report
    model, plans = apply_steps(job, tried[report.chosen])
    report.plans = [p.report() for p in plans]
    report.loads = loading(model, options.out)
    return model, plans, report


def recommend(report: Report, what: str, limit: float) -> str | None:
    """Return the row that meets the budget at the least cost, None where none does.

    Of those within a size or a time, the one of best quality; of those within a loss of quality,
    the fastest.
    """
    within = [r for r in report.rows[1:] if report.share(r, what) <= limit]
    if not within:
        return None
    if what == "quality":
        return min(within, key=lambda r: r.forward_ms).name
    return min(within, key=lambda r: report.share(r, "quality")).name


def loading(model: nn.Module, out: str) -> str:
    """Return the lines that load a result."""
    if not out:
        return ""
    name = type(model).__name__
    if getattr(model, "main_input_name", None) is not None and hasattr(model, "config"):
        if is_stock(model):
            return f"from transformers import {name}\nmodel = {name}.from_pretrained({out!r})"
        return (
            "import manyheads.bridges.transformers  # the stock class cannot express this model\n"
            f"from manyheads.compress import load_model\n"
            f"model = load_model({out!r})  # or the Auto class of its task"
        )
    return f"from manyheads.compress import load_model\nmodel = load_model({out!r})"


def _measure(
    job: Job, models: dict[str, nn.Module], qualities: dict[str, Quality], tell: Tell | None
) -> list[Measured]:
    return measure_all(
        models,
        job.feed,
        job.calibration[0],
        qualities,
        repeats=job.options.repeats,
        progress=None if tell is None else lambda share, text: tell(0.6 + 0.4 * share, text),
    )


def _rescaled(found: Sequence[Measured], original: Measured) -> Measured:
    by = original.forward_ms / found[0].forward_ms
    row = found[1]
    token = None
    if row.token_ms is not None and found[0].token_ms and original.token_ms:
        token = row.token_ms * original.token_ms / found[0].token_ms
    return replace(row, forward_ms=row.forward_ms * by, token_ms=token)


def _report(job: Job, rows: list[Measured], plans: Sequence[Plan]) -> Report:
    options = job.options
    return Report(
        model=options.model,
        rows=rows,
        data={
            "calibrated by": options.calibrate or options.evaluate,
            "judged on": options.evaluate or "the calibration",
            "pieces": sum(len(next(iter(b.values()))) for b in job.calibration),
            "batch timed": " x ".join(
                str(n) for n in next(iter(job.calibration[0].values())).shape
            ),
            "timing": f"median of {options.repeats} rounds, original and result in turn",
        },
        machine={**machine_facts(), "threads": torch.get_num_threads()},
        plans=[p.report() for p in plans],
        notes=list(job.notes),
    )


def _key(job: Job) -> dict[str, Any]:
    kept = job.options.to_dict()
    for name in ("out", "json", "list", "budget", "repeats"):
        kept.pop(name)
    data = hashlib.sha256()
    for batch in job.calibration:
        for name, tensor in batch.items():
            data.update(name.encode())
            data.update(tensor.contiguous().numpy().tobytes())
    return {"options": kept, "model": fingerprint(job.model), "calibration": data.hexdigest()[:16]}


class _Kept:
    """Measured candidates on disk, for a search that is interrupted."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.rows: dict[str, Any] = {}
        if path is not None and path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except json.JSONDecodeError:
                record = {}
            if record.get("key") == key:
                self.rows = record["rows"]

    def get(self, name: str) -> list[Measured] | None:
        found = self.rows.get(name)
        if found is None:
            return None
        return [Measured(**(row | {"quality": Quality(**row["quality"])})) for row in found]

    def put(self, name: str, rows: Sequence[Measured]) -> None:
        self.rows[name] = [r.to_dict() for r in rows]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft = self.path.with_name(self.path.name + ".part")
            draft.write_text(json.dumps({"key": self.key, "rows": self.rows}), encoding="utf-8")
            draft.replace(self.path)
