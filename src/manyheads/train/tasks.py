"""Loss and accuracy of generated tasks with a class to name at the scored places.

B batch, N length, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import Task, TaskBatch, TaskConfig
from manyheads.models.base import Model
from manyheads.train.loop import evaluating, sum_over_processes
from manyheads.train.mixer_options import RecallOptions
from manyheads.train.options import URPETaskOptions
from manyheads.train.stop import StopRequest

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["task_accuracy", "task_loss"]


def task_loss(module: nn.Module, batch: TaskBatch) -> Tensor:
    """Return the mean cross entropy at the scored places, in nats."""
    logits = module(batch.inputs)  # (B, N, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())


def task_accuracy(
    fabric: Fabric,
    model: Model,
    task: Task,
    config: TaskConfig,
    options: RecallOptions | URPETaskOptions,
    stop: StopRequest,
    *,
    part: int = 0,
) -> tuple[int, int]:
    """Return how many of the scored places a model answers rightly, of how many.

    The sequences are of the task's held-out fold, which no training batch contains; ``part`` =
    0, 1, ... says which ``options.eval_samples`` of them.
    """
    first = part * options.eval_samples
    own = range(first + fabric.global_rank, first + options.eval_samples, fabric.world_size)
    right, count = 0, 0
    with evaluating(fabric, model):
        for start in range(0, len(own), options.batch_size):
            stop.check()
            indices = own[start : start + options.batch_size]
            batch = task.batch(config, seed=options.seed, indices=indices, fold="held_out")
            inputs, targets, _ = fabric.to_device(batch)
            answers = model(inputs).argmax(-1)
            right += int((answers == targets).sum())
            count += int((targets >= 0).sum())
    right, count = (int(n) for n in sum_over_processes(fabric, right, count))
    return right, count
