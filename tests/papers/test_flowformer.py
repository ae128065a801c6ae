"""The parts of Flowformer's claim that need no clock."""

from __future__ import annotations

import pytest

from manyheads.papers.flowformer import conservation_error, prefix_error


@pytest.mark.parametrize("is_causal", [False, True])
def test_flows_are_conserved(is_causal) -> None:
    assert 0 < conservation_error(is_causal=is_causal) < 1e-5


def test_the_causal_form_is_a_recurrence() -> None:
    assert 0 < prefix_error(length=130, prefill=100) < 1e-5
