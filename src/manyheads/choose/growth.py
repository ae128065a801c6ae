"""What times at several lengths say: the exponent of growth, and where two curves cross."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["crossover", "fit_exponent"]


def fit_exponent(lengths: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Fit seconds = c * length ** exponent by least squares in logarithms.

    Returns:
        The exponent and the share of the variance that the fit explains, r² (1 where the
        seconds do not vary).

    Raises:
        ValueError: fewer than two different lengths, unequal counts, or a number not positive.
    """
    x, y = _logs("lengths", lengths), _logs("seconds", seconds)
    if len(x) != len(y):
        raise ValueError(f"{len(x)} lengths but {len(y)} seconds")
    if len(set(x)) < 2:
        raise ValueError(f"lengths {list(lengths)}: an exponent needs two different ones")
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xx = sum((a - mean_x) ** 2 for a in x)
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    yy = sum((b - mean_y) ** 2 for b in y)
    exponent = xy / xx
    return exponent, (xy * xy / (xx * yy) if yy > 1e-18 else 1.0)


def crossover(
    lengths: Sequence[float], a_seconds: Sequence[float], b_seconds: Sequence[float]
) -> float | None:
    """Return the length from which a is faster than b and stays so, up to the longest measured.

    Between the last length where a was not faster and the next, both times are taken as powers
    of the length. The shortest length is returned if a is faster from there on (the crossover
    lies at or below it), None if a is not faster at the longest.

    Raises:
        ValueError: no lengths, unequal counts, repeated lengths, or a number not positive.
    """
    x = _logs("lengths", lengths)
    a, b = _logs("a_seconds", a_seconds), _logs("b_seconds", b_seconds)
    if not len(x) == len(a) == len(b):
        raise ValueError(f"{len(x)} lengths but {len(a)} and {len(b)} seconds")
    if not x or len(set(x)) < len(x):
        raise ValueError(f"lengths {list(lengths)} must be different from each other, at least one")
    points = sorted(zip(x, (t - u for t, u in zip(a, b, strict=True)), strict=True))
    if points[-1][1] >= 0:
        return None
    faster_from = max((i + 1 for i, (_, gap) in enumerate(points) if gap >= 0), default=0)
    if faster_from == 0:
        return math.exp(points[0][0])
    (x0, gap0), (x1, gap1) = points[faster_from - 1], points[faster_from]
    return math.exp(x0 + (x1 - x0) * gap0 / (gap0 - gap1))


def _logs(name: str, values: Sequence[float]) -> list[float]:
    for value in values:
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} has {value}: logarithms need positive finite numbers")
    return [math.log(value) for value in values]
