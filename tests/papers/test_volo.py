"""The parts of VOLO's claim that need no clock."""

from __future__ import annotations

import torch

from compare import assert_close
from manyheads.attention.grid.outlook import outlook
from manyheads.papers.volo import definition_error, unfolded, unmixing_error


def test_the_fast_form_is_the_definition() -> None:
    assert 0 < definition_error() <= 1e-6


def test_the_form_that_is_timed_against_is_the_same() -> None:
    value, weights = torch.randn(2, 9, 6, 12), torch.rand(2, 5, 3, 3, 9, 9)
    assert_close(unfolded(value, weights), outlook(value, weights, stride=2), 1e-6)


def test_unmixing_is_exact() -> None:
    assert unmixing_error() == 0


def test_the_measurement_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    definition_error()
    unmixing_error()
    assert torch.equal(torch.get_rng_state(), before)
