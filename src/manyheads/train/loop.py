"""The loop that the recipes share: steps, evaluations, checkpoints, and stopping in between."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

from manyheads.models.base import Model
from manyheads.train.checkpoint import write_model
from manyheads.train.folder import RunFolder
from manyheads.train.logs import MetricsLog, Recorder, Terminal
from manyheads.train.optim import adamw, cosine, set_learning_rate
from manyheads.train.options import TrainOptions
from manyheads.train.state import Position, load_state, save_state
from manyheads.train.stop import Interrupted, StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = [
    "Batches",
    "evaluating",
    "fit",
    "load_kept",
    "open_folder",
    "part_size",
    "seed_process",
    "sum_over_processes",
]


class Batches(Protocol):
    """Endless batches for one process; batch k depends on k alone, not on those before."""

    def batch(self, step: int) -> Any:
        """Return batch ``step``."""


@contextmanager
def open_folder(fabric: Fabric, options: TrainOptions, data: dict[str, Any]) -> Iterator[RunFolder]:
    """Hold the run's folder open in the process that writes; all processes see its errors."""
    folder, problem = RunFolder(options), None
    try:
        if fabric.is_global_zero:
            try:
                folder.open(data)
            except ValueError as error:
                problem = str(error)
        problem = fabric.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)
        yield folder
    finally:
        folder.close()


def seed_process(fabric: Fabric, seed: int) -> None:
    """Seed the generators differently in every process (the weights are made before)."""
    words = np.random.SeedSequence((seed, fabric.global_rank)).generate_state(4).tolist()
    torch.manual_seed(words[0] << 31 | words[1] >> 1)
    np.random.seed(words[2])
    random.seed(words[3])


def part_size(fabric: Fabric, options: TrainOptions) -> int:
    """Return how many sequences a process computes at once."""
    return options.batch_size // (fabric.world_size * options.accumulate)


@contextmanager
def evaluating(fabric: Fabric, model: nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients, with the precision of training."""
    training = model.training
    model.eval()
    try:
        # No inference_mode: a table that a module keeps from here must serve in training too.
        with torch.no_grad(), fabric.autocast():
            yield
    finally:
        model.train(training)


def sum_over_processes(fabric: Fabric, *values: float) -> list[float]:
    """Add up what each process counted over its share of the held-out data."""
    if fabric.world_size == 1:
        return list(values)
    dtype = torch.float32 if fabric.device.type == "mps" else torch.float64
    total = fabric.all_reduce(
        torch.tensor(values, dtype=dtype, device=fabric.device), reduce_op="sum"
    )
    return cast(Tensor, total).tolist()


def load_kept(folder: RunFolder, model: Model) -> None:
    """Load the weights that the run kept into the model."""
    load_model(model, str(folder.path / "model.safetensors"))


def fit(
    fabric: Fabric,
    options: TrainOptions,
    folder: RunFolder,
    stop: StopRequest,
    model: Model,
    batches: Batches,
    *,
    loss: Callable[[nn.Module, Any], Tensor],
    evaluate: Callable[[], dict[str, float]],
    figures: tuple[str, ...],
    unit: tuple[str, int],
    sign: int = 0,
    shadow: Model | None = None,
    decay: float = 0.0,
) -> Position:
    """Train a model to the last step, from the run's checkpoint if there is one.

    Args:
        batches: of ``batch_size / (processes · accumulate)`` sequences.
        loss: mean over the targets of a batch; all batches have equally many.
        evaluate: returns figures, equal on every process.
        figures: the names of what ``evaluate`` returns.
        unit: name and number of what one step reads, such as ("tokens", 8192).
        sign: 1 where a higher first figure is better, -1 where a lower one is: the best weights
            are kept in ``model.safetensors``; 0 keeps the last ones.
        shadow: a copy of the model that follows it by moving averages and is what is kept.
        decay: of these averages, at most; they follow faster at first.

    Raises:
        Interrupted: the user asked to stop; the state is saved.
        ValueError: the checkpoint does not fit, or the loss is no number any more.
    """
    save_every = options.save_every or options.eval_every
    module, optimizer = _setup(fabric, options, model)
    if shadow is not None:
        shadow.to(fabric.device).requires_grad_(False)
    kept = model if shadow is None else shadow
    at = load_state(fabric, folder.checkpoint, model, optimizer, shadow)
    shown = options.progress and fabric.is_global_zero
    with Terminal(steps=options.steps, done=at.step, shown=shown) as terminal:
        terminal.say(f"{'going on in' if at.step else 'training in'} {folder.path}")
        log = _open_log(fabric, options, folder, figures, unit[0], at)
        record = Recorder(log, terminal, unit=unit, step=at.step, seconds=at.seconds)

        def save() -> None:
            at.seconds = record.seconds()
            if not sign and fabric.is_global_zero:
                write_model(kept, folder.path)
            save_state(fabric, folder.checkpoint, model, optimizer, at, shadow)

        def due() -> bool:
            regular = at.step % options.eval_every == 0 or at.step == options.steps
            return regular and at.step > max(at.evaluated, 0)

        while True:
            if due():
                begun = time.perf_counter()
                try:
                    values = evaluate()
                except Interrupted:
                    save()
                    raise
                at.evaluated = at.step
                first = values[figures[0]]
                if sign and (at.best is None or sign * first > sign * at.best):
                    at.best, at.best_step = first, at.step
                    if fabric.is_global_zero:
                        write_model(kept, folder.path)
                record.evaluated(at.step, values, time.perf_counter() - begun)
                save()
            if at.step == options.steps:
                break
            norm, asked = _step(fabric, options, module, optimizer, batches, loss, at, stop)
            if shadow is not None:
                _follow(shadow, model, min(decay, at.step / (at.step + 9)))
            if at.step % options.log_every == 0 or at.step == options.steps:
                rate = optimizer.param_groups[0]["lr"]
                mean = at.loss_sum / at.loss_count
                at.loss_sum, at.loss_count = 0.0, 0
                record.trained(
                    at.step, {"loss": mean, "learning_rate": rate, "gradient_norm": norm}
                )
            terminal.update(at.step)
            if asked or (at.step % save_every == 0 and not due()):
                save()
            if asked:
                raise Interrupted(asked)
        record.close()
    # The recipes go on with the weights that the first process kept.
    fabric.barrier()
    return at


@torch.no_grad()
def _follow(shadow: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every number of the shadow to the model's by the share 1 − decay."""
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, own in (*shadow.named_parameters(), *shadow.named_buffers()):
        if own.is_floating_point():
            own.lerp_(theirs[name].to(own), 1 - decay)
        else:
            own.copy_(theirs[name])


def _setup(
    fabric: Fabric, options: TrainOptions, model: Model
) -> tuple[nn.Module, torch.optim.Optimizer]:
    model.to(fabric.device)
    optimizer = adamw(model, learning_rate=options.learning_rate, weight_decay=options.weight_decay)
    module, optimizer = fabric.setup(model, optimizer)
    module.train()
    return module, optimizer


def _open_log(
    fabric: Fabric,
    options: TrainOptions,
    folder: RunFolder,
    figures: tuple[str, ...],
    unit: str,
    at: Position,
) -> MetricsLog | None:
    if not fabric.is_global_zero:
        return None
    return MetricsLog(
        folder.path,
        figures,
        ("loss", "learning_rate", "gradient_norm", "seconds", f"{unit}_per_s"),
        step=at.step,
        evaluated=at.evaluated,
        tensorboard=options.tensorboard,
    )


def _step(
    fabric: Fabric,
    options: TrainOptions,
    module: Any,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    at: Position,
    stop: StopRequest,
) -> tuple[float, int]:
    """Do one update; return the gradient's norm and the signal that asked to stop, or 0."""
    parts = options.accumulate
    total = torch.zeros((), device=fabric.device)
    for part in range(parts):
        batch = fabric.to_device(batches.batch(at.step * parts + part))
        with fabric.no_backward_sync(module, enabled=part + 1 < parts):
            value = loss(module, batch) / parts
            fabric.backward(value)
        total += value.detach()
    mean, asked = _agree(fabric, total, stop.signum)
    limit = options.clip or math.inf
    clipped = fabric.clip_gradients(module, optimizer, max_norm=limit, error_if_nonfinite=False)
    norm = float(cast(Tensor, clipped))
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise ValueError(
            f"loss {mean} and gradient norm {norm} at step {at.step + 1} are no numbers to go on "
            f"with: lower the learning_rate {options.learning_rate} or lengthen the warmup"
        )
    factor = cosine(
        at.step, steps=options.steps, warmup=options.warmup or 0, floor=options.lr_floor
    )
    set_learning_rate(optimizer, options.learning_rate * factor)
    optimizer.step()
    optimizer.zero_grad()
    at.step += 1
    at.loss_sum += mean
    at.loss_count += 1
    return norm, asked


def _agree(fabric: Fabric, loss: Tensor, signum: int) -> tuple[float, int]:
    """Return the mean loss of all processes, and a signal if one of them was asked to stop."""
    if fabric.world_size == 1:
        return loss.item(), signum
    both = torch.stack((loss, torch.tensor(float(signum), device=loss.device)))
    gathered = cast(Tensor, fabric.all_gather(both)).view(-1, 2)
    return gathered[:, 0].mean().item(), int(gathered[:, 1].max())
