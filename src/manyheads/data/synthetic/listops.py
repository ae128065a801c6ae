"""ListOps: nested operations on lists of digits; the class is the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from manyheads.data.synthetic.task import Task, TaskConfig

__all__ = ["LISTOPS", "ListOpsConfig", "evaluate_listops", "listops_ids", "listops_text"]


def _median(values: list[int]) -> int:
    values = sorted(values)
    middle = len(values) // 2
    # An even list: the mean of the middle two, rounded down.
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) // 2


_OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}
_END = "]"
# A digit's id is the digit, so a class and the token that names it are the same number.
_TOKENS = (*"0123456789", *_OPERATORS, _END)
_IDS = {token: i for i, token in enumerate(_TOKENS)}
_PAD = len(_TOKENS)
_OPERATOR_SHARE = 0.25
_ATTEMPTS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOpsConfig(TaskConfig):
    """ListOps by the rules of the Long Range Arena (arXiv 2011.04006).

    A node above the depth limit is an operator with probability 1/4, else a digit; an operator is
    MIN, MAX, MED (the median, rounded down) or SM (sum modulo 10), each as likely, and has 2 to
    ``max_args`` arguments. An expression is kept if its length (operators, digits and closing
    brackets) lies within the bounds. The defaults are the arena's. Ids: digits 0 to 9 as
    themselves, MIN 10, MAX 11, MED 12, SM 13, ] 14, padding 15. 10 classes.

    Args:
        max_depth: levels of nodes, the digits of the innermost lists included.
        max_args: arguments an operator has at most.
        min_length, max_length: bounds, included.

    Raises:
        ValueError: bounds that no expression of that depth meets.
    """

    max_depth: int = 10
    max_args: int = 10
    min_length: int = 501
    max_length: int = 1999

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.max_length:
            raise ValueError(
                f"length from {self.min_length} to {self.max_length}: need 1 <= min <= max"
            )
        if not 1 <= self.max_depth <= 100 or self.max_args < 2:
            raise ValueError(
                f"max_depth {self.max_depth} and max_args {self.max_args}: need a depth of 1 to "
                "100 and 2 arguments or more"
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, self.min_length)
        if longest < self.min_length or (self.max_length < 4 and self.min_length > 1):
            raise ValueError(
                f"no expression of depth {self.max_depth} with {self.max_args} arguments has a "
                f"length from {self.min_length} to {self.max_length}: lower min_length or raise "
                "max_depth, max_args or max_length"
            )

    @property
    def num_tokens(self) -> int:
        return len(_TOKENS) + 1

    @property
    def num_outputs(self) -> int:
        return 10

    @property
    def longest(self) -> int:
        return self.max_length

    @property
    def pad_id(self) -> int:
        return _PAD


def listops_ids(text: str) -> list[int]:
    """Return the ids of an expression such as ``"[MAX 2 [SM 9 4 ] ]"``.

    Raises:
        ValueError: a word that is no token.
    """
    words = text.split()
    for word in words:
        if word not in _IDS:
            raise ValueError(f"{word!r} is no ListOps token; the tokens are {' '.join(_TOKENS)}")
    return [_IDS[word] for word in words]


def listops_text(ids: Iterable[int] | Tensor) -> str:
    """Return the expression that ids stand for; padding is left out."""
    numbers = ids.tolist() if isinstance(ids, Tensor) else ids
    return " ".join(_TOKENS[int(i)] for i in numbers if int(i) != _PAD)


def evaluate_listops(ids: Sequence[int] | Tensor) -> int:
    """Return the exact value, 0 to 9, of one expression.

    Raises:
        ValueError: brackets that do not match, an operator without arguments, several expressions.
    """
    stack: list[tuple[str, list[int]]] = []
    values: list[int] = []
    for word in listops_text(ids).split():
        if word in _OPERATORS:
            stack.append((word, values))
            values = []
        elif word != _END:
            values.append(int(word))
        elif stack and values:
            operator, outer = stack.pop()
            outer.append(_OPERATORS[operator](values))
            values = outer
        else:
            raise ValueError("a ] closes no operator with arguments: check the brackets")
    if stack or len(values) != 1:
        raise ValueError(
            f"{len(stack)} operators are open and {len(values)} values stand at the top at the "
            "end: give one closed expression"
        )
    return values[0]


def _draw(config: ListOpsConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # `Random.random` is the one stream that Python keeps from version to version.
    uniform = random.Random(int(rng.integers(1 << 62))).random
    for _ in range(_ATTEMPTS):
        ids: list[int] = []
        # A lone digit is too short unless length 1 is wanted: begin with an operator right away.
        fits = _grow(ids, config, uniform, depth=1, share=config.min_length == 1)
        if fits and len(ids) >= config.min_length:
            return np.array(ids), np.array(evaluate_listops(ids))
    raise ValueError(
        f"no ListOps expression with length {config.min_length} to {config.max_length} in "
        f"{_ATTEMPTS} attempts: widen the bounds, or raise max_depth or max_args"
    )


def _grow(
    ids: list[int],
    config: ListOpsConfig,
    uniform: Callable[[], float],
    *,
    depth: int,
    share: bool = True,
) -> bool:
    """Append one node; return False as soon as the expression is too long."""
    if depth == config.max_depth or (share and uniform() >= _OPERATOR_SHARE):
        ids.append(int(10 * uniform()))
        return len(ids) <= config.max_length
    ids.append(10 + int(len(_OPERATORS) * uniform()))
    for _ in range(2 + int((config.max_args - 1) * uniform())):
        if not _grow(ids, config, uniform, depth=depth + 1):
            return False
    ids.append(_IDS[_END])
    return len(ids) <= config.max_length


LISTOPS = Task(
    name="listops",
    summary="the value of nested MIN, MAX, MED and SM of digits: 10 classes",
    kind="label",
    config=ListOpsConfig,
    draw=_draw,
)
