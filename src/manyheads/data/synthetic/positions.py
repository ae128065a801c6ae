"""Even token prediction and position identification: what a relative bias alone cannot do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manyheads.data.synthetic.task import NOT_SCORED, Task, TaskConfig

__all__ = ["ETP", "PI", "PositionConfig"]

# Ids below stand for padding (1) and other special tokens; words start here.
_FIRST_WORD = 11
_UNUSED_WORDS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionConfig(TaskConfig):
    """Sizes of the two synthetic tasks of "Your Transformer May Not be as Powerful as You Expect"
    (arXiv 2205.13401).

    Inputs are random ids in [11, W - 9), W = ``words``; the vocabulary has W + 11 ids.

    Args:
        words: W.
        length: N.

    Raises:
        ValueError: no word left to draw, or (in PI) more places than ids.
    """

    words: int = 1000
    length: int = 128

    def __post_init__(self) -> None:
        if self.words <= _UNUSED_WORDS:
            raise ValueError(f"words {self.words} leaves none to draw: use {_UNUSED_WORDS + 1}+")
        if not 2 <= self.length < self.num_tokens:
            raise ValueError(
                f"length {self.length}: need 2 to {self.num_tokens - 1}, as an id names each place"
            )

    @property
    def num_tokens(self) -> int:
        return self.words + _FIRST_WORD

    @property
    def longest(self) -> int:
        return self.length

    @property
    def pad_id(self) -> int:
        return 1


def _inputs(config: PositionConfig, rng: np.random.Generator) -> np.ndarray:
    return _FIRST_WORD + rng.integers(config.words - _UNUSED_WORDS, size=config.length)


def _even_tokens(config: PositionConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    inputs = _inputs(config, rng)
    targets = np.full(config.length, config.words - 2)
    targets[: config.length // 2] = inputs[1::2]
    return inputs, targets


def _position(config: PositionConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    targets = 1 + np.arange(config.length)
    # Its target would be the padding id, which is never scored.
    targets[0] = NOT_SCORED
    return _inputs(config, rng), targets


ETP = Task(
    name="etp",
    summary="even token prediction: the 2nd, 4th, ... token in the first half, then a constant",
    kind="tokens",
    config=PositionConfig,
    draw=_even_tokens,
)
PI = Task(
    name="pi",
    summary="position identification: at every place its own number",
    kind="tokens",
    config=PositionConfig,
    draw=_position,
)
