"""The recurrent kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention.gla import GLAState, gla_step
from manyheads.native import disabled, library
from native.calls_recurrent import SHAPES, inputs

pytestmark = pytest.mark.skipif(
    library("recurrent") is None, reason="no C++ compiler: there are no kernels to test"
)


def compare(shape: tuple[int, ...], *, scale: float | None = None, seed: int = 0) -> None:
    *token, memory = inputs(shape, seed=seed)
    wanted, last = gla_step(GLAState(memory), *token, scale=scale)
    *narrow, own = (t.float() for t in (*token, memory))
    before = own.clone()
    with torch.no_grad():
        for kernels in (True, False):
            if kernels:
                out, after = gla_step(GLAState(own), *narrow, scale=scale)
            else:
                with disabled():
                    out, after = gla_step(GLAState(own), *narrow, scale=scale)
            assert torch.equal(own, before)
            if out.numel() and shape[3]:
                assert_close(out.double(), wanted, 1e-5)
                assert_close(after.memory.double(), last.memory, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_token(shape, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(shape)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    dim=st.integers(3, 70),
    values=st.integers(5, 140),
    scale=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, heads, dim, values, scale, seed) -> None:
    compare((batch, *heads, dim, values), scale=scale, seed=seed)


def test_gates_that_forget_everything() -> None:
    *token, memory = (t.float() for t in inputs((2, 3, 3, 20, 33)))
    token[3] = torch.full_like(token[3], -torch.inf)
    with torch.no_grad():
        _, after = gla_step(GLAState(memory), *token)
    assert_close(after.memory, token[1][..., None] * token[2][..., None, :], 1e-6)


def test_the_operator_passes_torchs_own_checks() -> None:
    given = tuple(t.float() for t in inputs((2, 2, 2, 9, 20)))
    torch.library.opcheck(torch.ops.manyheads.gla_step, given)
