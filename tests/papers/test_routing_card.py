"""The parts of routing's claim that need no clock."""

from __future__ import annotations

import pytest
import torch

from manyheads.papers.routing import centroid_alignment, far_lookup, step_error


def test_steps_and_centroids() -> None:
    before = torch.get_rng_state()
    assert step_error() <= 1e-4
    assert centroid_alignment() > 0.95
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_routing_finds_what_local_heads_cannot_reach() -> None:
    found, near = (far_lookup(local, lambda _: None, seed=2) for local in (2, 4))
    assert near < 0.3
    assert found - near > 0.3
