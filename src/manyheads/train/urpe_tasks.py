"""Train the URPE encoder on two tasks that a relative bias alone cannot do (2205.13401).

Rows of a softmax sum to 1, so with a bias inside it and no absolute positions the first layers
cannot tell a place from another where tokens are alike; the multiplier behind the softmax can.
``--no-multiplier`` trains the model without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from manyheads.data import TaskBatches, get_task
from manyheads.data.synthetic import PositionConfig
from manyheads.models.language.urpe import URPEEncoder, URPEEncoderConfig
from manyheads.train.files import write_json
from manyheads.train.launch import launch
from manyheads.train.loop import fit, load_kept, open_folder, part_size, seed_process
from manyheads.train.options import URPETaskOptions
from manyheads.train.report import results
from manyheads.train.stop import StopRequest
from manyheads.train.tasks import task_accuracy, task_loss

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["URPETaskOptions", "run", "train"]


class Prepared(NamedTuple):
    """What is checked before any work."""

    task: PositionConfig
    config: URPEEncoderConfig


def run(options: URPETaskOptions) -> int:
    """Do ``manyheads train urpe-tasks``; returns the exit code."""
    return launch(options, prepare, train)


def prepare(options: URPETaskOptions) -> Prepared:
    """Build the configs of the task and the model, so that their errors come before any work."""
    task = PositionConfig(words=options.words, length=options.length)
    config = URPEEncoderConfig(
        vocab_size=task.num_tokens,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mlp_width=options.mlp_dim,
        max_length=options.length,
        padding_id=task.pad_id,
        multiplier="unique" if options.multiplier else "none",
        # As published: the names of places are no words, so their task has a head of its own.
        tie_embeddings=options.task == "etp",
    )
    with torch.device("meta"):
        URPEEncoder(config)
    return Prepared(task, config)


def train(
    fabric: Fabric, options: URPETaskOptions, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    task = get_task(options.task)
    with open_folder(fabric, options, {}) as folder:
        # Set up.
        torch.manual_seed(options.seed)
        model = URPEEncoder(prepared.config)
        seed_process(fabric, options.seed)
        batches = TaskBatches(
            task,
            prepared.task,
            batch_size=part_size(fabric, options),
            seed=options.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

        # Fit.
        def evaluate() -> dict[str, float]:
            right, count = task_accuracy(fabric, model, task, prepared.task, options, stop)
            return {"accuracy": right / count}

        at = fit(
            fabric,
            options,
            folder,
            stop,
            model,
            batches,
            loss=task_loss,
            evaluate=evaluate,
            figures=("accuracy",),
            unit=("tokens", options.batch_size * options.length),
            sign=1,
        )

        # Evaluate the weights that were best on the way, on other sequences than those.
        load_kept(folder, model)
        right, count = task_accuracy(fabric, model, task, prepared.task, options, stop, part=1)
        attention = "URPE" if options.multiplier else "relative bias alone"
        found = results(
            options,
            title=f"{task.name} with {attention}, {model.num_parameters():,} parameters, "
            f"{options.length} tokens ({task.summary})",
            figures={
                "accuracy": right / count,
                "places": count,
                "best_step": at.best_step,
                "sequences_read": options.steps * options.batch_size,
                "seconds": at.seconds,
            },
            parameters=model.num_parameters(),
            model=model.config.to_dict(),
        )
        if fabric.is_global_zero:
            write_json(folder.results, found)
        return found
