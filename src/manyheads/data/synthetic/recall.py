"""Multi-query associative recall: which value stood beside this key?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from manyheads.data.synthetic.task import NOT_SCORED, Task, TaskConfig

__all__ = ["RECALL", "RecallConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallConfig(TaskConfig):
    """Multi-query associative recall (MQAR) of "Zoology" (arXiv 2312.04927).

    A segment is K pairs (key, value), then slots of two places each; K slots start with one of
    the keys as a query, and the model must name its value there. The distance of a query follows
    a power law: slot s = 1, 2, ... is drawn with weight s^(power - 1), without replacement.
    Keys are ids 1 ... V/2 - 1, values V/2 ... V - 1, all different within a segment; each key is
    queried once. Every other place holds filler.

    Args:
        vocab_size: V; above 1000 or so the task tells mechanisms apart best.
        length: N.
        pairs: K; 4 K places must fit into the length.
        power: exponent a of the power law; 1 spreads the queries evenly, near 0 puts them close.
        segments: a sequence is as many of these, one behind the other, each with bindings of its
            own: what was bound before has to be forgotten. ``length`` is that of a segment.
        filler: ``random`` ids (of the whole vocabulary but the keys in use, so that a key after
            the pairs is always a query) or ``zero``.

    Raises:
        ValueError: pairs that do not fit the length or the vocabulary; an unknown filler; less
            than one segment.
    """

    vocab_size: int = 8192
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    filler: Literal["random", "zero"] = "random"
    segments: int = 1

    def __post_init__(self) -> None:
        if self.pairs < 1 or 4 * self.pairs > self.length:
            raise ValueError(
                f"{self.pairs} pairs need 4 places each, length is {self.length}: "
                f"use 1 to {self.length // 4} pairs or a longer sequence"
            )
        if self.vocab_size // 2 - 1 < self.pairs:
            raise ValueError(
                f"vocab_size {self.vocab_size} has {max(self.vocab_size // 2 - 1, 0)} keys, "
                f"{self.pairs} pairs need as many: use vocab_size {2 * self.pairs + 2} or more"
            )
        if self.filler not in ("random", "zero"):
            raise ValueError(f"filler {self.filler!r} is none of random, zero")
        if self.segments < 1:
            raise ValueError(f"segments {self.segments} must be at least 1")

    @property
    def num_tokens(self) -> int:
        return self.vocab_size

    @property
    def longest(self) -> int:
        return self.length * self.segments


def _draw(config: RecallConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    parts = [_segment(config, rng) for _ in range(config.segments)]
    inputs, targets = (np.concatenate(p) for p in zip(*parts, strict=True))
    return inputs, targets


def _segment(config: RecallConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    pairs, half = config.pairs, config.vocab_size // 2
    keys = 1 + rng.choice(half - 1, pairs, replace=False)
    values = half + rng.choice(config.vocab_size - half, pairs, replace=False)

    slots = (config.length - 2 * pairs) // 2
    weights = np.arange(1, slots + 1, dtype=np.float64) ** (config.power - 1)
    # The order of exponential arrival times is that of weighted draws without replacement.
    chosen = np.argsort(rng.exponential(size=slots) / weights)[:pairs]
    places = 2 * pairs + 2 * chosen

    inputs = np.zeros(config.length, dtype=np.int64)
    if config.filler == "random":
        # Draw among the ids that remain without the keys, then step over the keys below.
        free = rng.integers(config.vocab_size - pairs, size=config.length)
        below = np.sort(keys) - np.arange(pairs)
        inputs[:] = free + np.searchsorted(below, free, side="right")
    inputs[0 : 2 * pairs : 2], inputs[1 : 2 * pairs : 2] = keys, values
    inputs[places] = keys
    targets = np.full(config.length, NOT_SCORED, dtype=np.int64)
    targets[places] = values
    return inputs, targets


RECALL = Task(
    name="recall",
    summary="multi-query associative recall: name the value that stood beside a key",
    kind="tokens",
    config=RecallConfig,
    draw=_draw,
)
