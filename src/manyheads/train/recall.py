"""Train a small model on multi-query associative recall, measured on sequences it never saw.

B batch, N length, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from manyheads.data import TaskBatches, get_task
from manyheads.data.synthetic import RecallConfig
from manyheads.layers.state import state_bytes
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train.files import write_json
from manyheads.train.launch import launch
from manyheads.train.loop import fit, load_kept, open_folder, part_size, seed_process
from manyheads.train.mixer_options import RecallOptions
from manyheads.train.report import results
from manyheads.train.stop import StopRequest
from manyheads.train.tasks import task_accuracy, task_loss

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["RecallOptions", "decoding_state_bytes", "run", "train"]


class Prepared(NamedTuple):
    """What is checked before any work."""

    task: RecallConfig
    config: MixerLMConfig


def run(options: RecallOptions) -> int:
    """Do ``manyheads train recall``; returns the exit code."""
    return launch(options, prepare, train)


def prepare(options: RecallOptions) -> Prepared:
    """Build the configs of the task and the model, so that their errors come before any work."""
    task = RecallConfig(
        vocab_size=options.vocab_size,
        length=options.length,
        pairs=options.pairs,
        power=options.power,
        segments=options.segments,
    )
    config = MixerLMConfig(
        vocab_size=task.num_tokens,
        embed_dim=options.embed_dim,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        mixers=options.mixers,
        mixer_options=options.read_mixer_options(),
        mlp_ratio=options.mlp_ratio,
        max_length=max(2048, task.longest),
        dropout=options.dropout,
    )
    with torch.device("meta"):
        MixerLM(config)
    return Prepared(task, config)


def train(
    fabric: Fabric, options: RecallOptions, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    task = get_task("recall")
    with open_folder(fabric, options, {}) as folder:
        # Set up.
        torch.manual_seed(options.seed)
        model = MixerLM(prepared.config)
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
        found = results(
            options,
            title=f"recall {options.mixers}, {model.num_parameters():,} parameters, "
            f"{options.pairs} pairs in {options.length} tokens, vocabulary {options.vocab_size}",
            figures={
                "accuracy": right / count,
                "queries": count,
                "chance": 1 / (options.vocab_size - options.vocab_size // 2),
                "state_bytes": decoding_state_bytes(model, options.length),
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


@torch.no_grad()
def decoding_state_bytes(model: MixerLM, length: int) -> int:
    """Return what one sequence holds in memory after that many tokens, over all layers."""
    device = model.embed.weight.device
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    _, state = model.eval().update(tokens, model.init_state(1))
    return state_bytes(state.layers)
