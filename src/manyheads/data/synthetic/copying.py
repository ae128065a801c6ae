"""Copying: say again what stood before, all of it or only what mattered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manyheads.data.synthetic.task import NOT_SCORED, Task, TaskConfig

__all__ = ["COPY", "SELECTIVE_COPY", "CopyConfig", "SelectiveCopyConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyConfig(TaskConfig):
    """Random symbols, a delimiter, and the symbols again.

    Ids: 0 padding, 1 delimiter, 2 blank, symbols from 3 on. Scored from the delimiter on, where
    the targets are the symbols in order.

    Args:
        vocab_size: ids in all.
        symbols: how many are copied, at most.
        min_symbols: at least; below ``symbols`` the batch is ragged.
        teacher_forcing: True: the answer so far is the input of the next place, as in language
            modelling; False: blanks are, so the place must be counted from memory.

    Raises:
        ValueError: no symbol in the vocabulary, or bounds that are empty.
    """

    vocab_size: int = 32
    symbols: int = 64
    min_symbols: int | None = None
    teacher_forcing: bool = True

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocab_size, 4)
        least = self.symbols if self.min_symbols is None else self.min_symbols
        if not 1 <= least <= self.symbols:
            raise ValueError(f"symbols from {least} to {self.symbols}: need 1 <= min <= max")

    @property
    def num_tokens(self) -> int:
        return self.vocab_size

    @property
    def longest(self) -> int:
        return 2 * self.symbols


def _copy(config: CopyConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    least = config.symbols if config.min_symbols is None else config.min_symbols
    count = int(rng.integers(least, config.symbols + 1))
    symbols = rng.integers(3, config.vocab_size, size=count)
    again = symbols[:-1] if config.teacher_forcing else np.full(count - 1, 2)
    inputs = np.concatenate([symbols, [1], again])
    return inputs, np.concatenate([np.full(count, NOT_SCORED), symbols])


COPY = Task(
    name="copy",
    summary="copy all symbols after a delimiter",
    kind="tokens",
    config=CopyConfig,
    draw=_copy,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectiveCopyConfig(TaskConfig):
    """Symbols at random places among noise; then markers, at which they are named in order.

    Selective copying of "Mamba" (arXiv 2312.00752). Ids: 0 noise, 1 marker, symbols from 2 on.

    Args:
        vocab_size: ids in all.
        length: places of symbols and noise, before the markers.
        symbols: how many of them are symbols, and how many markers follow.

    Raises:
        ValueError: no symbol in the vocabulary, or more symbols than places.
    """

    vocab_size: int = 16
    length: int = 4096
    symbols: int = 16

    def __post_init__(self) -> None:
        _check_vocabulary(self.vocab_size, 3)
        if not 1 <= self.symbols <= self.length:
            raise ValueError(f"{self.symbols} symbols in length {self.length}: need 1 to length")

    @property
    def num_tokens(self) -> int:
        return self.vocab_size

    @property
    def longest(self) -> int:
        return self.length + self.symbols


def _selective_copy(
    config: SelectiveCopyConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    symbols = rng.integers(2, config.vocab_size, size=config.symbols)
    inputs = np.zeros(config.longest, dtype=np.int64)
    inputs[np.sort(rng.choice(config.length, config.symbols, replace=False))] = symbols
    inputs[config.length :] = 1
    targets = np.full(config.longest, NOT_SCORED, dtype=np.int64)
    targets[config.length :] = symbols
    return inputs, targets


SELECTIVE_COPY = Task(
    name="selective_copy",
    summary="name the symbols among noise, in order",
    kind="tokens",
    config=SelectiveCopyConfig,
    draw=_selective_copy,
)


def _check_vocabulary(vocab_size: int, least: int) -> None:
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} leaves no symbols: use {least} or more")
