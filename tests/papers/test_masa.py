"""The parts of MASA's claim that need no long training."""

from __future__ import annotations

import math

import torch

from manyheads.papers.masa import MarkovText, attention_numbers, measure, small_model


def test_text_is_drawn_by_the_two_tokens_before() -> None:
    text = MarkovText(3, batch_size=2000)
    batch = next(text)
    assert torch.equal(
        batch.inputs[:, 1:], batch.targets[:, :-1].where(torch.arange(23) > 0, batch.inputs[:, 1:])
    )
    least = text.least_loss(batch)
    p = text.probabilities
    assert 0.5 * float(-(p * p.log()).sum(-1).mean()) < least < 0.7 * math.log(16)
    assert (batch.targets[:, 0] == -100).all()
    assert (batch.targets[:, 1:] >= 0).all()
    again = MarkovText(3, batch_size=2000)
    assert torch.equal(next(again).inputs, batch.inputs)
    other = MarkovText(3, batch_size=2000, held_out=True)
    assert torch.equal(other.probabilities, p)
    assert not torch.equal(next(other).inputs, batch.inputs)


def test_models_are_of_one_size() -> None:
    numbers = {k: attention_numbers(small_model(k, 0)) for k in ("masa", "repeat", "low-rank")}
    assert numbers["repeat"] == numbers["low-rank"] == 18432
    assert numbers["masa"] == 18432 + 4 * 2 * 6
    assert attention_numbers(small_model("dense", 0)) == 55296


def test_a_measurement_says_what_it_compared() -> None:
    before = torch.get_rng_state()
    found = measure(lambda text: None, seeds=(0,), steps=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [c.size for c in found.checks[:2]] == [True, True]
    assert set(found.figures["losses"]) == {"masa", "repeat", "sequential", "low-rank"}
    again = measure(lambda text: None, seeds=(0,), steps=2)
    assert again.figures["losses"] == found.figures["losses"]
