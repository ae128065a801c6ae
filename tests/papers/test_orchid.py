"""The parts of Orchid's claim that need no clock."""

from __future__ import annotations

import pytest
import torch

from manyheads.papers.orchid import direct_sum_error, recall_accuracy, shift_error


def test_the_fft_is_the_sum() -> None:
    for length in (7, 64):
        assert 0 < direct_sum_error(length) < 1e-5


def test_only_kernels_without_a_phase_commute_with_shifts() -> None:
    for kind in ("type1", "type2"):
        assert shift_error(kind) < 1e-5
    assert shift_error("phase") > 0.1


@pytest.mark.slow
def test_two_layers_learn_recall() -> None:
    assert recall_accuracy("type1") > 0.9


def test_the_measurement_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shift_error("type2")
    recall_accuracy("type1", steps=1)
    assert torch.equal(torch.get_rng_state(), before)
