"""The small models that claims train: one loop, one schedule, one measure of accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data.synthetic import Task, TaskBatch, TaskConfig
from manyheads.data.synthetic.task import NOT_SCORED

__all__ = ["fit", "held_out_accuracy", "token_loss"]

_WARM_UP_STEPS = 30
_CLIP = 1.0
_TOLD_EVERY = 50


def fit(
    model: nn.Module,
    batches: Iterator[TaskBatch],
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    progress: Callable[[str], None],
) -> None:
    """Train a model: linear warm-up, linear fall to zero, gradients clipped to norm 1.

    Args:
        model: inputs to what ``loss`` takes.
        batches: endless; of a generated task, or of images.
        loss: ``loss(output, targets)``.
        optimizer: its groups' rates are the highest of the schedule.
        steps: of training.
        progress: told the step now and then.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _WARM_UP_STEPS) * (1 - step / steps)
    )
    for step in range(steps):
        if step % _TOLD_EVERY == 0:
            progress(f"step {step} of {steps}")
        inputs, targets, _ = next(batches)
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        schedule.step()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of (B, N, V) at the scored places of (B, N)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_SCORED)


@torch.no_grad()
def held_out_accuracy(model: nn.Module, task: Task, config: TaskConfig, *, samples: int) -> float:
    """Return the share of scored places answered rightly, on sequences never trained on."""
    inputs, targets, _ = task.batch(config, seed=1, indices=range(samples), fold="held_out")
    scored = targets != NOT_SCORED
    return float((model(inputs).argmax(-1) == targets)[scored].float().mean())
