"""The recommendation, from the rows alone.

The rule, stated in every report: a candidate qualifies if its quality is within a tolerance of the
best at every task that was measured (3 % in bits per byte at equal seconds, ten points of
accuracy, of images at equal seconds; no quality measured: all qualify). A task in accuracy that no
candidate learned, which is to be 20 points above guessing, decides nothing. Of those that qualify
the fastest is recommended, by the geometric mean over the workload's phases of its time over
softmax's. Softmax is kept unless the winner's gain is beyond the measured spread.
"""

from __future__ import annotations

import math
from typing import Any

from manyheads.choose.results import Answer, CostRow, Results, Summary
from manyheads.choose.units import show_bytes, show_seconds
from manyheads.choose.workload import REFERENCE, Workload

__all__ = ["ACCURACY_TOLERANCE", "LEARNED", "TEXT_TOLERANCE", "decide", "pareto_front"]

TEXT_TOLERANCE = 0.03
ACCURACY_TOLERANCE = 0.10
LEARNED = 0.20  # accuracy above guessing
FEW_STEPS = 100  # of training, below which the answer warns that text was judged early
_FIELDS = {"train": "train", "prefill": "forward", "decode": "decode"}
_WORDS = {
    "train": "forward and backward",
    "prefill": "a forward pass",
    "decode": "decoding a token",
}


def decide(results: Results) -> Answer:
    """Return the answer that the measured and predicted rows give; see the module for the rule."""
    workload = results.workload
    scores = {m: _scores(results, m) for m in workload.candidates}
    timed = {m: s for m, s in scores.items() if s["time"] is not None}
    partial = len(timed) < len(scores) or _quality_is_missing(results)
    if not timed:
        return Answer(best=None, partial=True, scores=scores)
    guesses = _unlearned(results)
    tasks = sorted({task for s in scores.values() for task in s["quality"]} - set(guesses))
    bars = {task: _bar(task, timed) for task in tasks}
    fit = [m for m in timed if all(_passes(scores[m], t, bars[t]) for t in tasks)]
    relaxed = not fit
    if relaxed:
        # Nothing is good at everything: text decides, or the first task.
        first = "text" if "text" in tasks else tasks[0]
        fit = [m for m in timed if _passes(scores[m], first, bars[first])] or list(timed)
    best = min(fit, key=lambda m: (timed[m]["time"], m))
    kept = False
    if best != REFERENCE and REFERENCE in fit:
        gain = 1 - timed[best]["time"] / timed[REFERENCE]["time"]
        kept = gain <= timed[best]["time_spread"] + timed[REFERENCE]["time_spread"]
        best = REFERENCE if kept else best
    ties = tuple(m for m in fit if m != best and _tied(timed[m], timed[best]))
    front = pareto_front({m: _axes(timed[m], tasks) for m in timed})
    ordered = sorted(front, key=lambda m: (m != best, timed[m]["time"], m))
    return Answer(
        best=best,
        reasons=_reasons(
            results, best, scores, fit, tasks, list(guesses), kept=kept, relaxed=relaxed
        ),
        front=tuple(ordered),
        ties=ties,
        loses=(*_losing(results, best, scores, bars), *_early(results), *guesses.values()),
        partial=partial,
        scores=scores,
    )


def pareto_front(points: dict[str, tuple[float, ...]]) -> list[str]:
    """Return the names that no other point beats: less is better on every axis.

    A point is beaten by one that is nowhere worse and somewhere better.
    """

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [n for n, p in points.items() if not any(beats(q, p) for q in points.values())]


def _scores(results: Results, mixer: str) -> dict[str, Any]:
    """Return time relative to softmax, its spread, memory, state and quality by task."""
    workload = results.workload
    row, reference = results.cost_row(mixer), results.cost_row(REFERENCE)
    time, spread, predicted = _relative_time(row, reference, workload)
    quality: dict[str, float] = {}
    for q in results.quality:
        wanted = q.regime == ("tokens" if q.task in workload.probes else "seconds")
        if q.mixer == mixer and wanted and q.value is not None:
            quality[q.task] = q.value
    return {
        "time": time,
        "time_spread": spread,
        "predicted": predicted,
        "peak_bytes": None if row is None else row.peak_bytes,
        "state_bytes": None if row is None else row.state_bytes,
        "quality": quality,
    }


def _relative_time(
    row: CostRow | None, reference: CostRow | None, workload: Workload
) -> tuple[float | None, float, bool]:
    ratios, spreads, predicted = [], [], False
    for phase in workload.does:
        name = _FIELDS[phase]
        mine = None if row is None else getattr(row, f"{name}_seconds")
        if row is None or mine is None:
            return None, 0.0, False
        theirs = None if reference is None else getattr(reference, f"{name}_seconds")
        ratios.append(math.log(mine) - (math.log(theirs) if theirs else 0.0))
        lower, upper = getattr(row, f"{name}_lower"), getattr(row, f"{name}_upper")
        if lower is not None and upper is not None:
            spreads.append((upper - lower) / 2 / mine)
        predicted = predicted or f"{name}_seconds" in row.predicted
    spread = max(spreads, default=0.0)
    return math.exp(sum(ratios) / len(ratios)), spread, predicted


def _unlearned(results: Results) -> dict[str, str]:
    """Return the tasks in accuracy that no candidate learned, each with a sentence about it."""
    told = {}
    for task in (t for t in results.workload.tasks if t != "text"):
        rows = [q for q in results.quality if q.task == task]
        best = max((q.value for q in rows if q.value is not None), default=None)
        chance = max((q.chance or 0.0 for q in rows), default=0.0)
        if best is not None and best < chance + LEARNED:
            told[task] = (
                f"{task} decided nothing: no candidate learned it in this budget (the best has "
                f"{best:.0%}, guessing {chance:.0%}); a longer --budget tells more."
            )
    return told


def _early(results: Results) -> list[str]:
    """Return a sentence that warns of text or images judged after few steps."""
    task = results.workload.main_task
    steps = [
        q.details["steps"]
        for q in results.quality
        if q.task == task and q.regime == "seconds" and "steps" in q.details
    ]
    if not steps or min(steps) >= FEW_STEPS:
        return []
    was = "were" if task == "images" else "was"
    return [
        f"{task} {was} judged early, after {min(steps):,} training steps at the least: a longer "
        "--budget tells more."
    ]


def _quality_is_missing(results: Results) -> bool:
    workload = results.workload
    have = {(q.mixer, q.task) for q in results.quality}
    return any((m, t) not in have for m in workload.candidates for t in workload.tasks)


def _bar(task: str, timed: dict[str, dict[str, Any]]) -> float:
    values = [s["quality"][task] for s in timed.values() if task in s["quality"]]
    if not values:
        return math.inf if task == "text" else -math.inf
    return (
        min(values) * (1 + TEXT_TOLERANCE) if task == "text" else max(values) - ACCURACY_TOLERANCE
    )


def _passes(score: dict[str, Any], task: str, bar: float) -> bool:
    value = score["quality"].get(task)
    if value is None:
        return math.isinf(bar)
    return value <= bar if task == "text" else value >= bar


def _tied(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return abs(math.log(a["time"] / b["time"])) <= a["time_spread"] + b["time_spread"]


def _axes(score: dict[str, Any], tasks: list[str]) -> tuple[float, ...]:
    def or_worst(value: float | None) -> float:
        return math.inf if value is None else float(value)

    quality = [
        or_worst(score["quality"].get(t)) if t == "text" else -score["quality"].get(t, -math.inf)
        for t in tasks
    ]
    return (
        score["time"],
        or_worst(score["peak_bytes"]),
        or_worst(score["state_bytes"]),
        *quality,
    )


def _reasons(
    results: Results,
    best: str,
    scores: dict[str, dict[str, Any]],
    fit: list[str],
    tasks: list[str],
    unlearned: list[str],
    *,
    kept: bool,
    relaxed: bool,
) -> tuple[str, ...]:
    """Return two sentences: the cost, then what the choice rests on."""
    workload = results.workload
    at = f"{'at length' if workload.grid is None else 'on'} {workload.where(workload.length)}"
    others = [m for m in scores if m != best and scores[m]["time"] is not None]
    if best == REFERENCE:
        quicker = [m for m in others if scores[m]["time"] < scores[REFERENCE]["time"]]
        if kept:
            first = f"Keep softmax: nothing that qualifies is faster {at} beyond the spread."
        elif quicker and tasks:
            named = ", ".join(sorted(quicker, key=lambda m: scores[m]["time"])[:3])
            first = f"Keep softmax: {named} would be faster {at}, but not as good."
        else:
            first = f"Keep softmax: it is the fastest of {len(others) + 1} candidates {at}."
    else:
        costs = []
        for phase in workload.does:
            ratio = _ratio(results, best, phase)
            if ratio is not None:
                word = f"{ratio:.1f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x slower"
                costs.append(f"{word} than softmax in {_WORDS[phase]}")
        guess = " (in part predicted)" if scores[best]["predicted"] else ""
        first = f"{best} is {' and '.join(costs)} {at}{guess}."
    if not tasks and unlearned:
        second = f"No candidate learned {_listed(unlearned)} in this budget: the choice rests on "
        second += "time alone, and changing the mechanism needs training."
    elif not tasks:
        second = "No quality was measured: the choice rests on time alone, and changing the "
        second += "mechanism needs training."
    elif relaxed:
        second = f"No candidate is near the best at all of {_listed(tasks)}: text decided."
    else:
        words = _quality_words(scores[best], tasks)
        if len(fit) == 1:
            second = f"It alone of {len(scores)} candidates is near the best at {_listed(tasks)} "
            second += f"({words})."
        else:
            second = f"Of {len(scores)} candidates {len(fit)} are near the best at "
            second += f"{_listed(tasks)} ({words}), and it is the fastest of these."
    return first, second


def _ratio(results: Results, mixer: str, phase: str) -> float | None:
    row, reference = results.cost_row(mixer), results.cost_row(REFERENCE)
    mine = row and getattr(row, f"{_FIELDS[phase]}_seconds")
    theirs = reference and getattr(reference, f"{_FIELDS[phase]}_seconds")
    return theirs / mine if mine and theirs else None


def _listed(tasks: list[str]) -> str:
    return tasks[0] if len(tasks) == 1 else f"{', '.join(tasks[:-1])} and {tasks[-1]}"


def _quality_words(score: dict[str, Any], tasks: list[str]) -> str:
    parts = []
    for task in tasks:
        if task not in score["quality"]:
            continue
        value = score["quality"][task]
        parts.append(f"{value:.3f} bits per byte" if task == "text" else f"{task} {value:.0%}")
    return ", ".join(parts)


def _losing(
    results: Results, best: str, scores: dict[str, dict[str, Any]], bars: dict[str, float]
) -> list[str]:
    """Say where the recommended one loses, and what put faster ones out."""
    lines = []
    own = scores[best]
    summary = next((s for s in results.summary if s.mixer == best), None)
    if best != REFERENCE and summary is not None:
        lines += _crossing(summary, "tokens" if results.workload.grid is None else "places")
        for phase in results.workload.does:
            ratio = _ratio(results, best, phase)
            row, reference = results.cost_row(best), results.cost_row(REFERENCE)
            if ratio is not None and ratio < 1 and row and reference:
                name = f"{_FIELDS[phase]}_seconds"
                lines.append(
                    f"{best} is slower than softmax in {_WORDS[phase]}: "
                    f"{show_seconds(getattr(row, name))} to "
                    f"{show_seconds(getattr(reference, name))}."
                )
    for task in bars:
        better = {
            m: s["quality"][task]
            for m, s in scores.items()
            if task in s["quality"] and task in own["quality"]
            and (s["quality"][task] < own["quality"][task] if task == "text"
                 else s["quality"][task] > own["quality"][task])
        }  # fmt: skip
        if better:
            top = (min if task == "text" else max)(better, key=lambda m: better[m])
            shown = "{:.3f} bits per byte" if task == "text" else "{:.0%} accuracy"
            lines.append(
                f"{top} is better at {task}: {shown.format(better[top])} to "
                f"{shown.format(own['quality'][task])} of {best}."
            )
    for mixer, score in scores.items():
        if mixer == best or score["time"] is None or score["time"] >= own["time"]:
            continue
        failed = [t for t, bar in bars.items() if not _passes(score, t, bar)]
        if failed:
            lines.append(f"{mixer} is faster but not near the best at {_listed(failed)}.")
    peak, state = own["peak_bytes"], own["state_bytes"]
    for what, value, key in (("memory", peak, "peak_bytes"), ("state", state, "state_bytes")):
        less = {m: s[key] for m, s in scores.items() if s[key] is not None and m != best}
        if value is not None and less and min(less.values()) < value:
            least = min(less, key=lambda m: less[m])
            lines.append(
                f"{least} needs less {what}: {show_bytes(less[least])} to {show_bytes(value)}."
            )
    return lines


def _crossing(summary: Summary, unit: str) -> list[str]:
    name = summary.mixer
    if summary.crossover_kind == "at" and summary.crossover is not None:
        return [f"Below about {summary.crossover:,.0f} {unit} softmax is faster than {name}."]
    if summary.crossover_kind == "never":
        return [f"Softmax is faster than {name} at every size measured in one pass."]
    return []
