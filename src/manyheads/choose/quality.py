"""The quality side: one small model for each mechanism, on text, images and small tasks.

B batch, N window length, V vocabulary.
"""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.choose.contest import EMBED_DIM, NUM_HEADS, Contest, model_layers, small_lm
from manyheads.choose.image_contest import image_contest
from manyheads.choose.probes import build_probe
from manyheads.choose.race import Entrant, Figure, Race, common_point
from manyheads.choose.results import Progress, QualityRow, Results, Unit
from manyheads.data import HeldOutWindows, TextSource, TokenBatches, split_text
from manyheads.layers.state import state_bytes
from manyheads.models.language.mixer_lm import MixerLM

__all__ = ["measure_quality", "text_contest"]

_TOKENS_A_STEP = 2048
_WINDOW = 512
_HELD_OUT_BYTES = 16384
_RATE = 3e-3
_TEXT_SHARE = 0.6


def measure_quality(results: Results, *, seconds: float, progress: Progress) -> None:
    """Train and measure small models; fills quality units and rows, resumes where it was.

    Args:
        results: of a workload with text or probes.
        seconds: for everything, divided among the tasks.
        progress: told the share done and what is going on.

    Raises:
        KeyboardInterrupt: unfinished models are kept beside the results, if they have a folder.
    """
    workload = results.workload
    tasks = list(workload.tasks)
    if not tasks:
        return
    weights = dict.fromkeys(tasks, 1.0)
    if "text" in weights and len(tasks) > 1:
        weights["text"] = _TEXT_SHARE / (1 - _TEXT_SHARE) * (len(tasks) - 1)
    end = time.perf_counter() + seconds
    for number, task in enumerate(tasks):
        if all(results.has(_key(task, m)) for m in workload.candidates):
            continue
        open_weight = sum(weights[t] for t in tasks[number:])
        share = (end - time.perf_counter()) * weights[task] / open_weight
        done = sum(weights[t] for t in tasks[:number]) / sum(weights.values())
        part = weights[task] / sum(weights.values())

        def tell(inner: float, text: str, done: float = done, part: float = part,
                 task: str = task) -> None:  # fmt: skip
            progress(min(done + part * inner, 1.0), f"{task}: {text}")

        if task == "images":
            contest = image_contest(results)
        else:
            contest = text_contest(results) if task == "text" else build_probe(task, workload)
        _run(results, contest, seconds=max(share, 1.0), progress=tell)
    progress(1.0, "quality")


def _run(results: Results, contest: Contest, *, seconds: float, progress: Progress) -> None:
    workload, begin = results.workload, time.perf_counter()
    folder = None if results.folder is None else results.folder / "unfinished" / contest.task
    entrants, failed = [], {}
    for mixer in workload.candidates:
        try:
            torch.manual_seed(workload.seed)
            model = contest.build(mixer)
        except ValueError as error:
            failed[mixer] = str(error).splitlines()[0]
            continue
        decayed = [p for p in model.parameters() if p.ndim >= 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        entrants.append(Entrant(mixer, model, torch.optim.AdamW(groups, betas=(0.9, 0.95))))
    race = Race(entrants, contest.loss, contest.evaluate, contest.tokens_a_step, _RATE, folder)
    race.run(seconds, progress)
    shared = common_point(entrants)
    spent = (time.perf_counter() - begin) / max(len(workload.candidates), 1)
    units, rows = [], []
    for entrant in entrants:
        if entrant.failure is not None or not entrant.curve:
            failed[entrant.name] = entrant.failure or "the budget did not reach its first figure"
            continue
        made = _rows(contest, entrant, shared)
        rows += made
        figures = {"rows": [r.to_dict() for r in made]}
        key = _key(contest.task, entrant.name)
        units.append(Unit(key=key, status="measured", figures=figures, seconds=spent))
    units += [
        Unit(key=_key(contest.task, m), status="failed", seconds=spent, reason=reason)
        for m, reason in failed.items()
    ]
    results.put_quality(*rows)
    results.put(*units)
    race.clear()
    if folder is not None and folder.parent.is_dir() and not any(folder.parent.iterdir()):
        shutil.rmtree(folder.parent)


def _key(task: str, mixer: str) -> str:
    return f"quality/{task}/{mixer}"


def _rows(contest: Contest, entrant: Entrant, shared: int | None) -> list[QualityRow]:
    """Return the row at equal tokens, and for text and images also the one at equal seconds."""
    model = entrant.model
    common: dict[str, Any] = {
        "mixer": entrant.name,
        "task": contest.task,
        "metric": contest.metric,
        "chance": contest.chance,
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": _state_bytes(model, contest.length),
        "curve": tuple((p.seconds, p.tokens, p.figure.value) for p in entrant.curve),
        "details": contest.details | {"steps": entrant.step},
    }
    places = {"tokens": next((p for p in entrant.curve if p.step == shared), None)}
    if contest.task in ("text", "images"):
        places["seconds"] = entrant.curve[-1]
    return [
        QualityRow(
            regime=regime,  # type: ignore[arg-type]
            value=point.figure.value,
            spread=point.figure.spread,
            seconds=point.seconds,
            tokens=point.tokens,
            **common,
        )
        for regime, point in places.items()
        if point is not None
    ]


def _state_bytes(model: nn.Module, length: int) -> int | None:
    if not isinstance(model, MixerLM):
        return None
    with torch.no_grad():
        _, state = model.update(torch.zeros(1, length, dtype=torch.long), model.init_state(1))
    return state_bytes(state)


def text_contest(results: Results) -> Contest:
    """Next-byte prediction on the workload's text, in bits per held-out byte."""
    workload = results.workload
    assert isinstance(results.source, TextSource)
    split = split_text(results.source)
    length = min(workload.length, _WINDOW, len(split.valid) - 1)
    batch_size = max(_TOKENS_A_STEP // length, 1)
    batches = TokenBatches(split.train, length=length, batch_size=batch_size, seed=workload.seed)
    held_out = split.valid[: _HELD_OUT_BYTES + 1]

    def loss(model: nn.Module, step: int) -> Tensor:
        inputs, targets, _ = batches.batch(step)
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(model: nn.Module) -> Figure:
        means, weights = [], []
        for inputs, targets, mask in HeldOutWindows(held_out, length=length, batch_size=batch_size):
            nats = F.cross_entropy(model(inputs, mask=mask).mT, targets, reduction="none")
            counts = (targets != -100).sum(1)
            means.append(nats.sum(1) / counts.clamp_min(1))
            weights.append(counts)
        mean, weight = torch.cat(means).double(), torch.cat(weights).double()
        bits = float((mean * weight).sum() / weight.sum()) / math.log(2)
        error = float(mean.std(unbiased=False)) / math.log(2) / math.sqrt(max(len(mean) - 1, 1))
        return Figure(bits, 1.96 * error)

    return Contest(
        task="text",
        metric="bits_per_byte",
        build=lambda mixer: small_lm(workload, mixer, vocab_size=256, length=length),
        loss=loss,
        evaluate=evaluate,
        tokens_a_step=length * batch_size,
        chance=8.0,
        length=length,
        details={
            "window": length,
            "embed_dim": EMBED_DIM,
            "num_heads": NUM_HEADS,
            "layers": model_layers(workload),
            "held_out_bytes": len(held_out) - 1,
        },
    )
