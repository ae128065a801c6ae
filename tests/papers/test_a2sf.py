"""The claim's task asks for what it says, and its helpers measure what they say."""

from __future__ import annotations

import pytest
import torch

from manyheads.papers import a2sf


def test_every_question_has_its_pair_in_the_prompt() -> None:
    tokens, targets = a2sf._sample(33, torch.Generator().manual_seed(3))
    assert tokens.shape == targets.shape == (33, a2sf._PROMPT + a2sf._AFTER)
    pairs, questions = tokens[:, : a2sf._KEYS], tokens[:, a2sf._KEYS :]
    keys, values = pairs // a2sf._VALUES, pairs % a2sf._VALUES
    asked = questions - a2sf._KEYS * a2sf._VALUES
    for row in range(33):
        table = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert len(table) == a2sf._KEYS
        found = [table[k] for k in asked[row].tolist()]
        assert found == targets[row, a2sf._KEYS :].tolist()
        early, late = asked[row, : a2sf._EARLY].tolist(), asked[row, a2sf._EARLY :].tolist()
        assert not set(early) & set(late)
        assert set(late[: a2sf._LATE]) == set(late[a2sf._LATE :])
    assert (targets[:, : a2sf._KEYS] == -100).all()


def test_uniform_attention_scores() -> None:
    expected = sum(1 / n for n in range(1, 257)) / sum(1 / n for n in range(129, 257))
    assert a2sf._first_over_middle(1.0) == pytest.approx(expected, rel=1e-4)
    assert a2sf._first_over_middle(0.2) == pytest.approx(1, abs=1e-4)


def test_tokens_after_the_budget_hold_no_more_bytes() -> None:
    state = a2sf._state(300)
    before = state.nbytes
    a2sf._token(state, torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64))
    assert state.nbytes == before
    assert len(state.held) == a2sf._BUDGET
