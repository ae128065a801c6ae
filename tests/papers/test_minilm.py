"""The parts of MiniLM's claim that need no clock and little time."""

from __future__ import annotations

import pytest
import torch

from manyheads.models.language.bert import BertConfig, BertEncoder
from manyheads.papers.minilm import learn, same_network


@pytest.fixture
def teacher() -> BertEncoder:
    config = BertConfig(
        vocab_size=1500, hidden_size=60, num_hidden_layers=4, num_attention_heads=12,
        intermediate_size=88, max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    return BertEncoder(config).eval()


def test_a_random_student_learns_and_the_draws_stay_its_own(teacher) -> None:
    before = torch.get_rng_state()
    losses = learn(teacher, steps=30, progress=lambda text: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_teacher_is_nearest_to_itself(teacher) -> None:
    found = same_network(teacher)
    assert found["itself"] < 1e-5 < found["third_layer"]
    assert found["general_form"] < 1e-6
