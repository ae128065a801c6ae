"""The parts of SLA's claim that need no clock."""

from __future__ import annotations

import torch

from manyheads.papers.sla import clustered_tokens, fitted_error, stable_ranks


def test_the_linear_branch_makes_up_for_sparsity() -> None:
    untrained, sparse, both = (
        fitted_error(branch, steps=steps)
        for branch, steps in (("sparse", 0), ("sparse", 60), ("main", 60))
    )
    assert both < 0.95 * sparse < untrained


def test_what_the_largest_weights_leave_is_of_low_rank() -> None:
    whole, left = stable_ranks()
    assert left < 0.25 * whole


def test_the_measurement_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    fitted_error("sla1", steps=1)
    stable_ranks()
    assert clustered_tokens(2, torch.Generator().manual_seed(0)).shape == (2, 256, 32)
    assert torch.equal(torch.get_rng_state(), before)
