"""A checkpoint is whole whatever happens, and holds all that training goes on from."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from manyheads.models import load_model
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.train import checkpoint
from manyheads.train.checkpoint import (
    model_tensors,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    restore_tensors,
    rng_state,
    set_rng_state,
    write_checkpoint,
    write_model,
)
from manyheads.train.optim import adamw

CPU = torch.device("cpu")


def build(**options) -> MixerLM:
    config = MixerLMConfig(
        vocab_size=50, embed_dim=20, num_heads=2, mixers="gla,softmax", dropout=0.1, **options
    )
    return MixerLM(config)


def steps(model, optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        tokens = torch.randint(50, (3, 32))
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tied", [True, False])
def test_all_goes_on_as_if_nothing_had_been(tmp_path, tied) -> None:
    model = build(tie_embeddings=tied)
    optimizer = adamw(model, learning_rate=1e-2)
    steps(model, optimizer, 3)
    tensors = {**model_tensors(model), **optimizer_tensors(optimizer, model)}
    rng = {f"rng.{k}": v for k, v in rng_state(CPU).items()}
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {**tensors, **rng}, {"step": 3, "best": 0.1 + 0.2, "nothing": None})
    expected = steps(model, optimizer, 3), random.random(), np.random.rand()

    torch.manual_seed(77)
    other = build(tie_embeddings=tied)
    again = adamw(other, learning_rate=1e-2)
    read, scalars = read_checkpoint(path)
    assert scalars == {"step": 3, "best": 0.1 + 0.2, "nothing": None}
    restore_tensors(other, read, path)
    restore_optimizer(again, other, read)
    set_rng_state({k[4:]: v for k, v in read.items() if k.startswith("rng.")}, CPU)
    assert (steps(other, again, 3), random.random(), np.random.rand()) == expected
    for name, tensor in model_tensors(model).items():
        assert torch.equal(tensor, model_tensors(other)[name]), name


def test_python_and_numpy_generators_with_a_gauss_in_store() -> None:
    random.gauss(0, 1), np.random.randn()
    state = rng_state(CPU)
    expected = [random.gauss(0, 1), random.random(), *np.random.randn(3), torch.rand(1).item()]
    set_rng_state(state, CPU)
    drawn = [random.gauss(0, 1), random.random(), *np.random.randn(3), torch.rand(1).item()]
    assert drawn == expected


def test_generators_out_of_a_row_of_several() -> None:
    torch.manual_seed(1)
    states = {k: torch.stack((v, v)) for k, v in rng_state(CPU).items()}
    states["torch"][0] = 0
    expected = torch.rand(3)
    set_rng_state({k: v[1] for k, v in states.items()}, CPU)
    assert torch.equal(torch.rand(3), expected)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})

    def full(*args, **kwargs) -> None:
        (tmp_path / ".writing-checkpoint.safetensors").write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        write_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, scalars = read_checkpoint(path)
    assert scalars == {"step": 1}
    assert torch.equal(tensors["a"], torch.ones(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_file_is_whole(tmp_path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.zeros(50_000)}, {"value": 0})
    seen = set()
    for attempt in range(15):
        child = os.fork()
        if child == 0:
            value = read_checkpoint(path)[1]["value"]
            while True:
                value += 1
                write_checkpoint(path, {"a": torch.full((50_000,), value)}, {"value": value})
        time.sleep(0.02 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, scalars = read_checkpoint(path)
        assert bool((tensors["a"] == scalars["value"]).all())
        seen.add(scalars["value"])
    assert len(seen) > 5


def test_damaged_and_foreign_files(tmp_path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, {"a": torch.ones(1000)}, {})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot be read.*--restart"):
        read_checkpoint(path)
    write_model(build(), tmp_path)
    with pytest.raises(ValueError, match="no checkpoint of a run"):
        read_checkpoint(tmp_path / "model.safetensors")


def test_another_model_is_refused(tmp_path) -> None:
    read = model_tensors(build())
    with pytest.raises(ValueError, match=r"another model.*head.weight"):
        restore_tensors(build(tie_embeddings=False), read, tmp_path)
    other = MixerLM(build().config.replace(vocab_size=51))
    with pytest.raises(ValueError, match=r"another model.*shapes"):
        restore_tensors(other, read, tmp_path)


def test_the_model_is_written_for_load_model(tmp_path) -> None:
    model = build().eval()
    write_model(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    tokens = torch.randint(50, (1, 63))
    assert torch.equal(load_model(tmp_path).eval()(tokens), model(tokens))
