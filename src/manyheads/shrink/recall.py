"""Runs of ``manyheads train recall``: their sequences, and how many queries a model answers.

B batch, N length.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.data import TaskBatch, get_task
from manyheads.data.synthetic import RecallConfig

__all__ = ["SOURCE", "RecallRun", "answered", "recall_run"]

SOURCE = "builtin:recall"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRun:
    """What a run was trained on.

    Attributes:
        task: sizes of the sequences.
        seed: of the run.
        judged: held-out sequences that the run itself has chosen its weights by.
    """

    task: RecallConfig
    seed: int
    judged: int

    def batches(self, samples: int, batch: int, *, held_out: bool) -> list[TaskBatch]:
        """Return sequences of training, or such as neither training nor its choices have seen."""
        first = self.judged if held_out else 0
        stop, task = first + samples, get_task("recall")
        parts = (range(at, min(at + batch, stop)) for at in range(first, stop, batch))
        return [
            task.batch(
                self.task, seed=self.seed, indices=part, fold="held_out" if held_out else "train"
            )
            for part in parts
        ]


def recall_run(folder: Path | None) -> RecallRun | None:
    """Return the task of a run of ``manyheads train recall``; None where the folder is none."""
    if folder is None or not (folder / "options.json").is_file():
        return None
    try:
        stored: dict[str, Any] = json.loads((folder / "options.json").read_text(encoding="utf-8"))
        if stored["recipe"] != "recall":
            return None
        options = stored["options"]
        names = ("vocab_size", "length", "pairs", "power", "segments")
        task = RecallConfig(**{name: options[name] for name in names})
        return RecallRun(task=task, seed=int(options["seed"]), judged=int(options["eval_samples"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(folder / 'options.json')!r} does not say what the run was trained on: {error}"
        ) from None


def answered(model: nn.Module, tokens: Tensor, *, prompt: int | None) -> tuple[Tensor, Any]:
    """Return the token that a model names at every place, (B, N), and its states at the end.

    Args:
        model: a causal language model of ours.
        tokens: (B, N).
        prompt: tokens that are read at once, the others one by one; None: all at once, without
            a state. Answers inside the prompt are those of its whole.
    """
    own: Any = model
    if prompt is None:
        return own(tokens).argmax(-1), ()
    logits, state = own.update(tokens[:, :prompt], own.init_state(len(tokens)))
    found = [logits.argmax(-1)]
    for place in range(prompt, tokens.shape[1]):
        logits, state = own.step(tokens[:, place], state)
        found.append(logits.argmax(-1)[:, None])
    return torch.cat(found, 1), state.layers
