"""What the generated tasks share: samples from numbers, batches with masks, held-out folds.

B batch, N longest length of the batch, C channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from manyheads.config import Config
from manyheads.data.seeding import check_rank, generator

__all__ = ["NOT_SCORED", "Fold", "Task", "TaskBatch", "TaskBatches", "TaskConfig"]

NOT_SCORED = -100
_HELD_OUT_ONE_IN = 8
_ATTEMPTS = 4096

Fold = Literal["all", "train", "held_out"]
Sample = tuple[np.ndarray, np.ndarray]


class TaskBatch(NamedTuple):
    """One batch of a generated task.

    Attributes:
        inputs: (B, N) int64 ids, or (B, N, C) float32 values; padded on the right.
        targets: (B, N) int64, -100 = not scored; (B,) int64 classes; or (B, N, C) float32 values,
            scored where ``mask`` is True.
        mask: (B, N) bool, True = a real token.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def at_last_token(self) -> TaskBatch:
        """Move labels (B,) to the last real token of each sequence (B, N), for a causal model."""
        if self.targets.ndim != 1:
            raise ValueError("targets stand at tokens already: this is for one label a sequence")
        targets = torch.full(self.mask.shape, NOT_SCORED)
        last = self.mask.sum(1) - 1
        targets[torch.arange(len(last)), last] = self.targets
        return TaskBatch(self.inputs, targets, self.mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig(Config):
    """Base of the tasks' configs: sizes a model for the task is built from."""

    @property
    def num_tokens(self) -> int:
        """Size of the input vocabulary; 0 for real-valued inputs."""
        raise TypeError(f"{type(self).__name__} has no tokens")

    @property
    def num_outputs(self) -> int:
        """Classes to predict among, or channels of a real-valued target."""
        return self.num_tokens

    @property
    def longest(self) -> int:
        """Length that no sequence exceeds."""
        raise TypeError(f"{type(self).__name__} has no length")

    @property
    def pad_id(self) -> int:
        """Id under the padding, whatever the mask says."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A generated task.

    Attributes:
        name: its key in `TASKS`.
        summary: one line.
        kind: what the targets are: ``tokens`` (a class at scored places), ``label`` (one class a
            sequence), ``values`` (real numbers at every place).
        config: its config class; the defaults are the published sizes where there are any.
        draw: one sample (inputs, targets) from a config and a generator.
    """

    name: str
    summary: str
    kind: Literal["tokens", "label", "values"]
    config: type[TaskConfig]
    draw: Callable[[Any, np.random.Generator], Sample]

    def sample(self, config: TaskConfig, *, seed: int, index: int, fold: Fold = "all") -> Sample:
        """Return one sample, a pure function of the arguments.

        Every possible input belongs to one fold by its own hash, about one in eight to
        ``held_out``: no sequence of one fold occurs in the other, under any seeds.

        Raises:
            ValueError: the fold has (almost) no sequences because the task is tiny.
        """
        if not isinstance(config, self.config):
            raise ValueError(
                f"task {self.name!r} takes a {self.config.__name__}, got {type(config).__name__}"
            )
        for attempt in range(_ATTEMPTS):
            inputs, targets = self.draw(config, generator(seed, index, attempt))
            if fold == "all" or (fold == "held_out") == _is_held_out(inputs):
                return inputs, targets
        raise ValueError(
            f"fold {fold!r} of task {self.name!r} is empty, it has too few different sequences: "
            "make the config larger or use fold 'all'"
        )

    def batch(
        self, config: TaskConfig, *, seed: int, indices: Iterable[int], fold: Fold = "all"
    ) -> TaskBatch:
        """Return the samples with those numbers, padded on the right to the longest of them.

        Raises:
            ValueError: no index, an unknown fold, a config of another task.
        """
        if fold not in ("all", "train", "held_out"):
            raise ValueError(f"fold {fold!r} is none of all, train, held_out")
        samples = [self.sample(config, seed=seed, index=i, fold=fold) for i in indices]
        if not samples:
            raise ValueError("indices are empty: give at least one sample number")
        inputs = [x for x, _ in samples]
        mask = _pad([np.ones(len(x), dtype=bool) for x in inputs], False)
        if self.kind == "label":
            targets = torch.from_numpy(np.stack([y for _, y in samples]))
        else:
            fill = 0.0 if self.kind == "values" else NOT_SCORED
            targets = _pad([y for _, y in samples], fill)
        pad = 0.0 if self.kind == "values" else config.pad_id
        return TaskBatch(_pad(inputs, pad), targets, mask)


class TaskBatches:
    """Endless training batches; batch k is a pure function of (seed, k, rank, world_size).

    Two processes with batch 4 see the samples of one process with batch 8.

    Args:
        task: an entry of `TASKS`.
        config: its config, or None for the defaults.
        batch_size: B of this process.
        seed: of the samples.
        fold: which sequences.
        rank, world_size: which process this is, of how many.
    """

    def __init__(
        self,
        task: Task,
        config: TaskConfig | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        fold: Fold = "train",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_rank(batch_size, rank, world_size)
        self.task, self.config = task, task.config() if config is None else config
        self.batch_size, self.seed, self.fold = batch_size, seed, fold
        self.rank, self.world_size = rank, world_size
        self.step = 0

    def batch(self, step: int) -> TaskBatch:
        """Return batch ``step`` of this process."""
        first = (step * self.world_size + self.rank) * self.batch_size
        indices = range(first, first + self.batch_size)
        return self.task.batch(self.config, seed=self.seed, indices=indices, fold=self.fold)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TaskBatch:
        batch = self.batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """Return all that the coming batches depend on beside the arguments."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.seed, self.step = int(state["seed"]), int(state["step"])


def _is_held_out(inputs: np.ndarray) -> bool:
    return zlib.crc32(np.ascontiguousarray(inputs).tobytes()) % _HELD_OUT_ONE_IN == 0


def _pad(arrays: list[np.ndarray], value: float | bool) -> Tensor:
    longest = max(len(a) for a in arrays)
    out = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
