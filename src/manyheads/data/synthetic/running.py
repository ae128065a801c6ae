"""Running mean and maximum of a noisy signal: what a prefix summary can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manyheads.data.synthetic.task import Task, TaskConfig

__all__ = ["RUNNING_MAX", "RUNNING_MEAN", "RunningConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningConfig(TaskConfig):
    """Standard normal values; the target at each place is their mean or maximum so far.

    Args:
        length: N, at most.
        min_length: at least; below ``length`` the batch is ragged.
        channels: C, each on its own.

    Raises:
        ValueError: bounds that are empty.
    """

    length: int = 64
    min_length: int | None = None
    channels: int = 1

    def __post_init__(self) -> None:
        least = self.length if self.min_length is None else self.min_length
        if not 1 <= least <= self.length or self.channels < 1:
            raise ValueError(
                f"length from {least} to {self.length} and {self.channels} channels: need "
                "1 <= min <= max and a channel"
            )

    @property
    def num_tokens(self) -> int:
        return 0

    @property
    def num_outputs(self) -> int:
        return self.channels

    @property
    def longest(self) -> int:
        return self.length


def _values(config: RunningConfig, rng: np.random.Generator) -> np.ndarray:
    least = config.length if config.min_length is None else config.min_length
    length = int(rng.integers(least, config.length + 1))
    return rng.standard_normal((length, config.channels))


def _mean(config: RunningConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    values = _values(config, rng)
    means = values.cumsum(0) / np.arange(1, len(values) + 1)[:, None]
    return values.astype(np.float32), means.astype(np.float32)


def _max(config: RunningConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    values = _values(config, rng).astype(np.float32)
    return values, np.maximum.accumulate(values)


RUNNING_MEAN = Task(
    name="running_mean",
    summary="the mean of all values so far",
    kind="values",
    config=RunningConfig,
    draw=_mean,
)
RUNNING_MAX = Task(
    name="running_max",
    summary="the largest value so far",
    kind="values",
    config=RunningConfig,
    draw=_max,
)
