"""The parts of TransNormer's claim that need no clock."""

from __future__ import annotations

from importlib import import_module

import pytest

from manyheads.papers.transnormer import PAPER, gradient_at


def test_the_denominator_has_no_bound_and_the_norm_has() -> None:
    for scale in (1.0, 1e-3, 1e-6):
        for eps in (1e-8, 1e-2):
            steepest, bound = gradient_at(scale, eps)
            assert steepest <= bound
    assert 9e5 < gradient_at(1e-6, None)[0] / gradient_at(1.0, None)[0] < 1.1e6
    assert gradient_at(1e-6, 1e-2)[0] < 1.01 * gradient_at(1e-5, 1e-2)[0]


def test_the_released_eps_bounds_nothing_in_practice() -> None:
    assert gradient_at(1e-6, 1e-8)[0] > 9 * gradient_at(1e-5, 1e-8)[0]


@pytest.mark.parametrize("name", PAPER.implements)
def test_what_the_card_names_is_there(name) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)
