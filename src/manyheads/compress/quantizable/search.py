"""Ranges of least squared error, searched on a grid or by golden sections.

The error is summed in float32 over each row of axis 0, then over the rows. With a zero point it is
a rugged function of the range: another order of summation may end in another minimum, of nearly
the same error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.compress.quantizable.quantizers import UniformQuantizer
from manyheads.errors import require_extra

__all__ = ["GridSearch", "golden_section", "squared_errors"]

_SHORTEST = 0.01  # of the largest range, where golden sections start


def squared_errors(x: Tensor, low: float, high: float, *, bits: int, symmetric: bool) -> Tensor:
    """Return the squared error of each row of axis 0 when a tensor is quantised to a range."""
    quantizer = UniformQuantizer(bits=bits, symmetric=symmetric)
    quantizer.set_range(torch.tensor(low).float(), torch.tensor(high).float())
    return (quantizer(x) - x).float().square().reshape(x.shape[0], -1).sum(1)


class GridSearch:
    """Candidates i = 1 .. n of i / n of the widest range; errors are summed over batches.

    Symmetric grids and data of one sign have one candidate an i, others also its shifts by up to
    a quarter of the grid. The candidates are fixed by the first batch, for all channels alike.
    """

    def __init__(
        self,
        first: Tensor,
        bits: int,
        symmetric: bool,
        per_channel: bool,
        candidates: int,
        margin: float,
    ) -> None:
        self.bits, self.symmetric, self.per_channel = bits, symmetric, per_channel
        low, high = float(first.min()), float(first.max())
        if symmetric or low >= 0:
            widest = max(abs(low), high) + margin
            ends = [widest * i / candidates for i in range(1, candidates + 1)]
            self.ranges = [(0.0 if low >= 0 else -end, end) for end in ends]
        else:
            least, most = low - margin, high + margin
            widest = max(abs(least), most)
            self.ranges = []
            for i in range(1, candidates + 1):
                end = widest * i / candidates
                delta = 2 * end / (2**bits - 1)
                for k in range(2**bits // 4):
                    for shift in (k * delta, -k * delta) if k else (0.0,):
                        self.ranges.append((max(-end + shift, least), min(end + shift, most)))
        self.errors: Tensor | None = None  # (channels or 1, candidates)

    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add a batch's errors and return the best range: scalars, or one a channel."""
        found = []
        for low, high in self.ranges:
            rows = squared_errors(x, low, high, bits=self.bits, symmetric=self.symmetric)
            found.append(rows if self.per_channel else rows.sum()[None])
        new = torch.stack(found, 1)
        self.errors = new if self.errors is None else self.errors + new
        ends = torch.tensor(self.ranges, dtype=torch.float64)[self.errors.argmin(1).cpu()]
        low_ends, high_ends = ends.unbind(1)
        return (low_ends, high_ends) if self.per_channel else (low_ends[0], high_ends[0])


def golden_section(
    x: Tensor, bits: int, symmetric: bool, per_channel: bool, margin: float
) -> tuple[Tensor, Tensor]:
    """Return the range that scipy's bounded search ends in; of one batch.

    Two-sided data with a zero point: a search over the shift inside that over the width.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    require_extra("scipy", "compress", "the estimator 'mse_golden'")
    low, high = float(x.min()), float(x.max())
    one_sided, two_ways = low >= 0, low < 0 and not symmetric
    widest = max(abs(low), high) + margin
    if two_ways:
        widest = max(abs(high + margin), abs(low - margin))

    def search(rows: Tensor) -> tuple[float, float]:
        def error(a: float, b: float) -> float:
            return float(squared_errors(rows, a, b, bits=bits, symmetric=symmetric).sum())

        def best_shift(r: float) -> float:
            reach = 2**bits // 4 * 2 * r / (2**bits - 1)
            return _bounded(lambda s: error(-r + s, r + s), -reach, reach)[0]

        def loss(r: float) -> float:
            shift = best_shift(r) if two_ways else 0.0
            return error(0.0 if one_sided else -r + shift, r + shift)

        r, _ = _bounded(loss, _SHORTEST * widest, widest)
        shift = best_shift(r) if two_ways else 0.0
        return (0.0 if one_sided else -r + shift), r + shift

    if not per_channel:
        a, b = search(x)
        return torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    pairs = torch.tensor([search(row[None]) for row in x], dtype=torch.float64)
    return pairs[:, 0], pairs[:, 1]


def _bounded(f: Callable[[float], float], low: float, high: float) -> tuple[float, float]:
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(f, bounds=(low, high), method="bounded")
    return float(found.x), float(found.fun)
