"""The parts of URPE's claim that need no clock."""

from __future__ import annotations

import pytest
import torch

from manyheads.papers.urpe import constant_input_spread, task_accuracy


def test_equal_tokens_stay_equal_under_a_bias_alone() -> None:
    assert constant_input_spread(multiplier=False) <= 1e-6
    assert constant_input_spread(multiplier=True) > 1e-2


@pytest.mark.slow
def test_the_multiplier_tells_places_apart() -> None:
    own, other = (task_accuracy("pi", kind) for kind in ("unique", "none"))
    assert other < 0.1
    assert own > 0.95


def test_the_measurement_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    constant_input_spread(multiplier=True)
    assert torch.equal(torch.get_rng_state(), before)
