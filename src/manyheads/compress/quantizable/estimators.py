"""Ranges for quantisers, from the batches that pass: extremes, moving extremes, least error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manyheads.compress.quantizable.search import GridSearch, golden_section
from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["RangeEstimator", "Scheme"]

Estimator = Literal["minmax", "running", "mse_grid", "mse_golden"]
_ESTIMATORS = ("minmax", "running", "mse_grid", "mse_golden")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme(Config):
    """How a kind of tensor is quantised.

    Attributes:
        bits: of the grid.
        symmetric, per_channel: see :class:`UniformQuantizer`.
        estimator: "minmax" (extremes of the last batch), "running" (moving average of extremes),
            "mse_grid" and "mse_golden" (the range of least squared error; the second needs scipy).
        momentum: of "running", on the old range.
        percentile: of "minmax" and "running": in place of extremes, for instance 99.999.
        candidates: ranges that "mse_grid" tries.
        margin: by which MSE ranges may exceed the data.
    """

    bits: int = 8
    symmetric: bool = False
    per_channel: bool = False
    estimator: Estimator = "minmax"
    momentum: float = 0.9
    percentile: float | None = None
    candidates: int = 100
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.estimator not in _ESTIMATORS:
            raise unknown_name("estimator", self.estimator, _ESTIMATORS)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must lie in [0, 1)")
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise ValueError(f"percentile {self.percentile} must lie in (50, 100]")
        if self.percentile is not None and self.estimator.startswith("mse"):
            raise ValueError(f"percentile has no meaning for {self.estimator!r}: leave it None")
        if self.candidates < 1:
            raise ValueError(f"candidates {self.candidates} must be at least 1")


class RangeEstimator:
    """The range of a tensor over batches, as a :class:`Scheme` says.

    Example:
        >>> estimator = RangeEstimator(Scheme(estimator="running"))
        >>> low, high = estimator.update(torch.randn(100))
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.range: tuple[Tensor, Tensor] | None = None
        self._search: GridSearch | None = None

    @torch.no_grad()
    def update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take a batch and return the range so far: scalars, or (C,) with ``per_channel``.

        Raises:
            ValueError: the batch is empty or holds NaN or infinity.
        """
        s = self.scheme
        x = x.detach()
        if x.numel() == 0 or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"a batch of shape {tuple(x.shape)} is empty or holds NaN or infinity: no range "
                "can be found"
            )
        if s.estimator == "mse_golden":
            new = golden_section(x, s.bits, s.symmetric, s.per_channel, s.margin)
        elif s.estimator == "mse_grid":
            if self._search is None:
                self._search = GridSearch(
                    x, s.bits, s.symmetric, s.per_channel, s.candidates, s.margin
                )
            new = self._search.update(x)
        else:
            new = self._extremes(x)
            if s.estimator == "running" and self.range is not None:
                low, high = (
                    s.momentum * old + (1 - s.momentum) * now
                    for old, now in zip(self.range, new, strict=True)
                )
                new = (low, high)
        self.range = new
        return new

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(x.shape[0], -1) if self.scheme.per_channel else x.reshape(1, -1)
        if self.scheme.percentile is None:
            low, high = rows.aminmax(dim=1)
        else:
            ends = (100 - self.scheme.percentile, self.scheme.percentile)
            found = np.percentile(rows.float().cpu().numpy(), ends, axis=1)
            low, high = (torch.tensor(f, dtype=torch.float64) for f in found)
        return (low, high) if self.scheme.per_channel else (low[0], high[0])
