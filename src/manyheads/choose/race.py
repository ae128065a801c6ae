"""Small models trained side by side: the same batches, in turns, measured at the same steps.

Every model takes training steps in turns, the one with the least training time next, so that
noise of the machine hits all alike. Held-out figures are taken at fixed steps, which makes the
curve against tokens a function of the seed alone, and once more at the end, when all have trained
for the same number of seconds.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Entrant", "Figure", "Point", "Race", "common_point", "grid_steps"]

_SLICE = 0.5  # seconds of training before the next model's turn
_WARM_UP_STEPS = 20
_DECAY_STEPS = 200
_CLIP = 1.0


class Figure(NamedTuple):
    """A held-out figure and the half-width of what chance may have added."""

    value: float
    spread: float


class Point(NamedTuple):
    """One place of a curve: steps, training seconds, tokens read, the figure."""

    step: int
    seconds: float
    tokens: int
    figure: Figure


@dataclass
class Entrant:
    """A model in the race, with what it has done so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    curve: list[Point] = field(default_factory=list)
    failure: str | None = None


def grid_steps(most: int = 100_000) -> list[int]:
    """Return the steps at which all models are measured: 4, 6, 8, 12, 16, 24, 32, ..."""
    steps, base = [], 4
    while base <= most:
        steps += [base, base * 3 // 2]
        base *= 2
    return [s for s in steps if s <= most]


def common_point(entrants: list[Entrant]) -> int | None:
    """Return the last step that every model was measured at, None if there is none."""
    steps = [{p.step for p in e.curve} for e in entrants if e.failure is None]
    shared = set.intersection(*steps) if steps else set()
    return max(shared, default=None)


@dataclass
class Race:
    """A training race.

    Attributes:
        entrants: the models.
        loss: ``loss(model, step)`` of training batch ``step``, a pure function of the step.
        evaluate: ``evaluate(model)`` on held-out data, the same for all.
        tokens_a_step: tokens of a training batch.
        rate: learning rate after warm-up; falls with the square root of the step.
        folder: where unfinished models are kept between runs, None: nowhere.
    """

    entrants: list[Entrant]
    loss: Callable[[nn.Module, int], Tensor]
    evaluate: Callable[[nn.Module], Figure]
    tokens_a_step: int
    rate: float
    folder: Path | None = None

    def run(self, seconds: float, progress: Callable[[float, str], None]) -> None:
        """Train until all models had their share of ``seconds``, evaluation included.

        On KeyboardInterrupt the models are kept in ``folder`` and the exception goes on.
        """
        self._restore()
        end = time.perf_counter() + seconds
        running = [e for e in self.entrants if e.failure is None]
        try:
            for entrant in running:
                self._warm(entrant)
            running = [e for e in running if e.failure is None]
            while running and time.perf_counter() < end:
                entrant = min(running, key=lambda e: e.seconds)
                self._turn(entrant)
                running = [e for e in self.entrants if e.failure is None]
                left = max(end - time.perf_counter(), 0.0)
                progress(1 - left / seconds, f"step {entrant.step} of {entrant.name}")
            self._finish()
        except KeyboardInterrupt:
            self._keep()
            raise

    def _warm(self, entrant: Entrant) -> None:
        """One pass without a step, so that no model pays for first calls."""
        try:
            self.loss(entrant.model, entrant.step).backward()
        except (RuntimeError, ValueError) as error:
            entrant.failure = str(error).splitlines()[0]
        entrant.optimizer.zero_grad()

    def _turn(self, entrant: Entrant) -> None:
        begin = time.perf_counter()
        grid = set(grid_steps())
        entrant.model.train()
        while True:
            for group in entrant.optimizer.param_groups:
                group["lr"] = self.rate * _schedule(entrant.step)
            loss = self.loss(entrant.model, entrant.step)
            value = loss.detach().item()
            if not math.isfinite(value):
                entrant.failure = f"the loss is {value} at step {entrant.step}"
                return
            loss.backward()
            nn.utils.clip_grad_norm_(entrant.model.parameters(), _CLIP)
            entrant.optimizer.step()
            entrant.optimizer.zero_grad()
            entrant.step += 1
            spent = time.perf_counter() - begin
            if entrant.step in grid or spent > _SLICE:
                entrant.seconds += spent
                break
        if entrant.step in grid:
            self._measure(entrant)

    def _measure(self, entrant: Entrant) -> None:
        if entrant.curve and entrant.curve[-1].step == entrant.step:
            return
        entrant.model.eval()
        with torch.no_grad():
            figure = self.evaluate(entrant.model)
        tokens = entrant.step * self.tokens_a_step
        entrant.curve.append(Point(entrant.step, entrant.seconds, tokens, figure))

    def _finish(self) -> None:
        for entrant in self.entrants:
            if entrant.failure is None and entrant.step:
                self._measure(entrant)

    def _path(self, entrant: Entrant) -> Path:
        assert self.folder is not None
        safe = "".join(c if c.isalnum() else "_" for c in entrant.name)
        return self.folder / f"{safe}.safetensors"

    def _keep(self) -> None:
        if self.folder is None:
            return
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        for entrant in self.entrants:
            tensors = {f"model.{k}": v for k, v in _unique(entrant.model).items()}
            for index, state in entrant.optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
            facts = {"step": entrant.step, "seconds": entrant.seconds, "curve": entrant.curve}
            path = self._path(entrant)
            temporary = path.with_suffix(".tmp")
            save_file(
                {k: v.contiguous() for k, v in tensors.items()},
                temporary,
                metadata={"facts": json.dumps(facts)},
            )
            temporary.replace(path)

    def _restore(self) -> None:
        if self.folder is None or not self.folder.is_dir():
            return
        from safetensors import safe_open

        for entrant in self.entrants:
            if not self._path(entrant).is_file():
                continue
            with safe_open(self._path(entrant), "pt") as file:
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["facts"])
            weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
            entrant.model.load_state_dict(weights, strict=False)
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith("optimizer."):
                    _, index, name = key.split(".", 2)
                    state.setdefault(int(index), {})[name] = tensor
            groups = entrant.optimizer.state_dict()["param_groups"]
            entrant.optimizer.load_state_dict({"state": state, "param_groups": groups})
            entrant.step, entrant.seconds = facts["step"], facts["seconds"]
            entrant.curve = [Point(s, t, n, Figure(*f)) for s, t, n, f in facts["curve"]]

    def clear(self) -> None:
        """Remove what was kept: the race is over."""
        if self.folder is not None and self.folder.is_dir():
            for entrant in self.entrants:
                self._path(entrant).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def _schedule(step: int) -> float:
    """A linear warm-up, then 1 / sqrt: a function of the step alone, whatever the time left."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS) / math.sqrt(1 + step / _DECAY_STEPS)


def _unique(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with tensors under two names kept once."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept
