"""The parts of SOFT's claim that need no clock."""

from __future__ import annotations

import torch

from manyheads.papers.soft import kernel_errors, peaks, unconverged


def test_memory_grows_with_the_places_and_errors_fall_with_landmarks() -> None:
    before = torch.get_rng_state()
    found = peaks()
    assert found["soft"][1] < 4.5 * found["soft"][0]
    assert found["exact"][1] > 10 * found["exact"][0]
    first, second, third = kernel_errors()
    assert first > 2 * second > 4 * third
    assert 0.05 < unconverged() < 1
    assert torch.equal(torch.get_rng_state(), before)
