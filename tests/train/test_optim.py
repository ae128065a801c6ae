"""The schedule's values and which parameters decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train.optim import adamw, cosine, parameter_groups, set_learning_rate


def test_schedule_values() -> None:
    factors = [cosine(k, steps=14, warmup=4, floor=0.1) for k in range(14)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[-1] == pytest.approx(0.1)
    assert factors[8] == pytest.approx(0.55)  # half of the fall
    assert factors[4] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 10)))
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_schedule_without_warmup_and_without_anything_else() -> None:
    assert cosine(0, steps=1, warmup=0) == pytest.approx(0.0)
    assert cosine(0, steps=2, warmup=0) == pytest.approx(0.5)
    assert [cosine(k, steps=3, warmup=3) for k in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_decay(tied) -> None:
    config = MixerLMConfig(
        embed_dim=20, num_heads=2, mixers="gla,softmax", tie_embeddings=tied,
        mixer_options={"gla": {"conv_size": 4}},
    )  # fmt: skip
    model = MixerLM(config)
    names = {p: n for n, p in model.named_parameters()}
    decayed, others = (
        {names[p] for p in group["params"]} for group in parameter_groups(model, 0.1)
    )
    assert decayed | others == set(names.values())
    assert not decayed & others
    assert others == {
        n
        for n in names.values()
        if n == "embed.weight" or n.endswith("bias") or "norm" in n or "_conv." in n
    }
    assert ("head.weight" in decayed) == (not tied)


def test_tables_and_frozen_parameters() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "mix": nn.Linear(3, 3)})
    model["mix"].weight.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == 2


def test_decay_acts_where_it_should() -> None:
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = adamw(model, learning_rate=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(model.weight, before[0] * 0.95)
    assert torch.equal(model.bias, before[1])
    set_learning_rate(optimizer, 0.3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]
