"""The loop by which claims train small models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.data.synthetic import CopyConfig, TaskBatches, get_task
from manyheads.papers.small import fit, held_out_accuracy, token_loss

TASK, CONFIG = get_task("copy"), CopyConfig(vocab_size=6, symbols=3)


def test_rates_rise_and_fall_to_zero() -> None:
    model = nn.Embedding(CONFIG.num_tokens, CONFIG.num_tokens)
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD(
        [
            {"params": [slow], "lr": 1.0},
            {"params": [fast], "lr": 3.0},
            {"params": [*model.parameters()]},
        ],
        lr=2.0,
    )
    rates, told = [], []

    def loss(logits, targets):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return token_loss(logits, targets)

    batches = TaskBatches(TASK, CONFIG, batch_size=2)
    fit(model, batches, loss, optimizer, steps=100, progress=told.append)
    assert len(rates) == 100
    assert rates[0][0] == pytest.approx(1 / 30)
    assert rates[29][0] == pytest.approx(1 - 29 / 100)
    assert rates[-1][0] == pytest.approx(0.01)
    assert all(r[1] == pytest.approx(3 * r[0]) for r in rates)
    assert told == ["step 0 of 100", "step 50 of 100"]


def test_training_lowers_the_loss_and_accuracy_counts_scored_places() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(CONFIG.num_tokens, CONFIG.num_outputs)
    held_out = TASK.batch(CONFIG, seed=1, indices=range(64), fold="held_out")
    before = token_loss(model(held_out.inputs), held_out.targets)
    fit(
        model,
        TaskBatches(TASK, CONFIG, batch_size=16),
        token_loss,
        torch.optim.Adam(model.parameters(), lr=0.1),
        steps=60,
        progress=lambda text: None,
    )
    assert token_loss(model(held_out.inputs), held_out.targets) < before - 0.1
    scored = held_out.targets >= 0
    right = (model(held_out.inputs).argmax(-1) == held_out.targets)[scored].float().mean()
    assert held_out_accuracy(model, TASK, CONFIG, samples=64) == pytest.approx(float(right))
