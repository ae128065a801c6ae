"""The parts of the landmark claim that need no clock."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from manyheads.papers.landmark import PAPER, pass_key_accuracy, pass_keys


@pytest.mark.parametrize("questions", [0, 8])
def test_a_pass_key_lies_in_one_block_before_all_questions(questions) -> None:
    ids, answers = pass_keys(200, 120, torch.Generator().manual_seed(0), questions=questions)
    place = (ids == 16).long().argmax(1)
    assert ((ids == 16).sum(1) == 1).all()
    assert (place // 15 == (place + 1) // 15).all()
    assert torch.equal(ids[torch.arange(200), place + 1], answers)
    assert (ids[:, -1] == 17).all()
    assert ((ids == 17).long().argmax(1) > place + 1).all()
    assert (answers < 16).all()


@pytest.mark.parametrize("landmarks", [True, False])
def test_both_models_run_at_both_lengths(landmarks) -> None:
    found = pass_key_accuracy(landmarks=landmarks, steps=1)
    assert set(found) == {120, 960}
    assert all(0 <= a < 0.5 for a in found.values())


@pytest.mark.parametrize("name", PAPER.implements)
def test_what_the_card_names_is_there(name) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)
