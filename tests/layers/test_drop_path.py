"""Stochastic depth."""

from __future__ import annotations

import pytest
import torch

from manyheads.layers.drop_path import DropPath


def test_whole_samples_are_dropped_and_the_mean_is_kept() -> None:
    layer, x = DropPath(0.25), torch.ones(4000, 3, 2)
    y = layer(x)
    assert y.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (y == y[:, :1, :1]).all()
    assert y.mean().item() == pytest.approx(1, abs=0.05)


def test_eval_and_rate_zero_are_the_identity() -> None:
    x = torch.randn(3, 5)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x


def test_a_rate_of_one_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rate 1\.0"):
        DropPath(1.0)
