"""Which branches go, given their similarities: most similar first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["degradation_ratio", "most_similar", "run_of_blocks", "within_tolerance"]


def most_similar(similarities: Sequence[float] | Tensor, n: int) -> list[int]:
    """Return the n indices of highest similarity, highest first, the earlier on ties.

    Example:
        >>> most_similar([0.2, 0.9, 0.5, 0.9], 3)
        [1, 3, 2]
    """
    values = torch.as_tensor(similarities, dtype=torch.float64)
    _check(n, len(values))
    return torch.sort(values, descending=True, stable=True).indices[:n].tolist()


def within_tolerance(
    similarities: Sequence[float] | Tensor, n: int, *, tolerance: float
) -> list[int]:
    """Return n indices: each time the first whose similarity is within ``tolerance`` of the most.

    Differences below the tolerance count as none, so that shallow blocks go first among equals.
    """
    values = torch.as_tensor(similarities, dtype=torch.float64).clone()
    _check(n, len(values))
    chosen: list[int] = []
    for _ in range(n):
        near = (values - values.max()).abs() < tolerance
        index = int(near.nonzero()[0]) if near.any() else int(values.argmax())
        chosen.append(index)
        values[index] = 0
    return chosen


def run_of_blocks(consecutive: Tensor, n: int, *, official_compat: bool = False) -> list[int]:
    """Return the n blocks in a row whose input and output are most similar.

    Args:
        consecutive: (L, L), [i, g - 1] compares the streams before blocks i and i + g.
        official_compat: read the column of n + 1 blocks, as the official code does.

    Raises:
        ValueError: n is above L, or equal to it with ``official_compat``, which then reads beyond
            the matrix.
    """
    layers = consecutive.shape[0]
    _check(n, layers)
    column = n if official_compat else n - 1
    if column >= layers:
        raise ValueError(
            f"official_compat reads the similarity over {n + 1} blocks, and there are {layers}: "
            "leave it False to drop them all"
        )
    start = int(consecutive[:, column].argmax())
    return list(range(start, min(start + n, layers)))


def degradation_ratio(quality_lost: float, speedup: float) -> float:
    """Return points of quality lost per per cent of speed won (the paper's SDR, lower is better).

    Args:
        quality_lost: in points, above zero where quality fell.
        speedup: time before over time after.

    Raises:
        ValueError: the speedup is not above 1.
    """
    if speedup <= 1:
        raise ValueError(f"the ratio is of a speedup above 1, and this is {speedup:.3g}")
    return quality_lost / (100 * (speedup - 1))


def _check(n: int, available: int) -> None:
    if not 0 < n <= available:
        raise ValueError(f"cannot drop {n} of {available}: give 1 to {available}")
