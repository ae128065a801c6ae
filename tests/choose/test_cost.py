"""Subjects: inputs from a seed, what is called, states filled cheaply but truly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from manyheads.choose.cost import Subject, TensorPool, bind, draw_inputs, filled_state
from manyheads.layers.state import state_bytes, state_tensors
from manyheads.registry import Shape, get_mechanism, list_mechanisms

SHAPE = Shape(heads=3, length=63, head_dim=20)
STREAMING = [n for n in list_mechanisms() if get_mechanism(n).step is not None]
CASES = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'bidirectional'}")
    for name in list_mechanisms()
    for causal in (True, False)
    if (get_mechanism(name).causal if causal else get_mechanism(name).bidirectional)
]


@pytest.mark.parametrize(("name", "causal"), CASES)
def test_everything_registered_can_be_called(name, causal) -> None:
    subject = Subject(name, replace(SHAPE, is_causal=causal))
    with torch.no_grad():
        expected = bind(subject.mechanism, causal)(**subject.inputs)
    assert torch.equal(subject.call("forward")(), expected)
    subject.call("train")()
    peak = subject.peak("train")
    assert peak["peak_bytes"] > 0
    assert subject.peak("forward")["peak_bytes"] <= peak["peak_bytes"]


@pytest.mark.parametrize("name", list_mechanisms())
def test_counted_flops_are_the_closed_form(name) -> None:
    mechanism = get_mechanism(name)
    for causal in (True, False):
        if mechanism.causal if causal else mechanism.bidirectional:
            subject = Subject(name, replace(SHAPE, length=256, is_causal=causal))
            assert subject.counted_flops() == pytest.approx(
                mechanism.flops(subject.shape), rel=0.05
            )


@pytest.mark.parametrize("name", list_mechanisms())
def test_one_seed_gives_the_same_inputs(name) -> None:
    mechanism = get_mechanism(name)
    first, same, other = (draw_inputs(mechanism, SHAPE, seed=s) for s in (7, 7, 8))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)
    half = draw_inputs(mechanism, SHAPE, dtype=torch.bfloat16, seed=7)
    assert all(t.dtype != torch.float32 for t in half.values())


def test_equal_inputs_are_shared() -> None:
    pool = TensorPool()
    a, b = (Subject(n, SHAPE, pool=pool) for n in ("gla", "softmax"))
    assert a.inputs["query"] is b.inputs["query"]
    assert a.inputs["key"] is not a.inputs["value"]


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("length", [5, 96, 200])
def test_states_are_what_update_would_leave(name, length) -> None:
    """Same tensors by size and type as after feeding every token."""
    mechanism = get_mechanism(name)
    shape = replace(SHAPE, length=length)
    state, token = filled_state(mechanism, shape)
    _, fed = mechanism.update(None, **draw_inputs(mechanism, shape))
    for a, b in zip(state_tensors(state), state_tensors(fed), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not b.is_floating_point() and not mechanism.constant_state:
            assert torch.equal(a, b)
    out, _ = mechanism.step(state, **token)
    assert torch.isfinite(out).all()
    assert out.shape == (1, 3, 20)


@pytest.mark.parametrize("name", STREAMING)
def test_state_bytes_grow_only_where_they_say(name) -> None:
    short, long = (Subject(name, replace(SHAPE, length=n)).state_bytes() for n in (100, 300))
    if get_mechanism(name).constant_state:
        assert short == long
    else:
        assert long == pytest.approx(3 * short, rel=0.05)


@pytest.mark.parametrize("name", STREAMING)
def test_a_decoding_call_is_the_same_each_time(name) -> None:
    """The cache does not grow from call to call, so the time belongs to one length."""
    subject = Subject(name, replace(SHAPE, length=130))
    call = subject.call("decode")
    sizes = {state_bytes(call()[1]) for _ in range(5)}
    assert len(sizes) == 1
    if name == "softmax":
        assert {int(call()[1].length) for _ in range(3)} == {132}


def test_a_long_cache_costs_no_more_than_its_memory() -> None:
    state, _ = filled_state(get_mechanism("softmax"), Shape(heads=2, length=200_000, head_dim=8))
    assert state.key.shape[2] == 200_000
    assert int(state.length) == 200_000
    assert torch.equal(state.key[:, :, :96], state.key[:, :, 96:192])


def test_no_state_without_direction() -> None:
    assert Subject("softmax", replace(SHAPE, is_causal=False)).state_bytes() is None
