"""The parts of MetaFormer's claim that need no clock, and a short form of its training."""

from __future__ import annotations

import pytest
import torch

from manyheads.papers.metaformer import published_costs, train_one


def test_m36_has_the_published_costs() -> None:
    parameters, products = published_costs()
    assert parameters == 56_172_520
    assert products == pytest.approx(8.759e9, rel=1e-3)
    assert 1 - parameters / 86.6e6 == pytest.approx(0.35, abs=0.01)
    assert 1 - products / 17.6e9 == pytest.approx(0.50, abs=0.01)


def test_what_is_measured_is_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    first, again = (train_one("pool", 0, lambda text: None, steps=12) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)


def test_places_that_do_not_mix_are_behind() -> None:
    """A third of the claim's steps: attention has overtaken a model without a mixer by far."""
    got = {m: train_one(m, 0, lambda text: None, steps=100) for m in ("identity", "attention")}
    assert got["attention"] > got["identity"] + 0.05
