"""The parts of DualToken-ViT's claim that need no clock."""

from __future__ import annotations

import torch

from manyheads.papers.dualtoken import PAPER, definition_error, order_matters


def test_positions_and_definition() -> None:
    before = torch.get_rng_state()
    aware, plain = order_matters()
    assert aware > 0.01 > 1e-9 > plain
    assert 0 < definition_error() < 1e-9
    assert PAPER.reconstruction
    assert torch.equal(torch.get_rng_state(), before)
