"""The recurrent kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention.gla import GLAState, gla_step, gla_update
from manyheads.attention.norm import norm_update
from manyheads.layers.recurrent import has_short_scan, short_scan
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


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 32)),
    dim=st.integers(3, 70),
    values=st.integers(5, 140),
    gated=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_short_sequences(sizes, dim, values, gated, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g, s = (
        torch.randn(*sizes[:2], *last, generator=generator, dtype=torch.float64)
        for last in ((sizes[2], dim), (sizes[2], dim), (sizes[2], values), (sizes[2], dim),
                     (dim, values))
    )  # fmt: skip
    gates = -g.exp() if gated else None
    wanted = short_scan(q, k, v, gates, s)  # float64: PyTorch
    own = short_scan(*(None if t is None else t.float() for t in (q, k, v, gates, s)))
    for a, b in zip(own, wanted, strict=True):
        assert_close(a.double(), b, 1e-5)


@pytest.mark.parametrize("length", [1, 5, 32])
def test_layers_read_short_blocks_by_the_kernel_and_agree(length) -> None:
    q, k, v, g = torch.randn(4, 2, 3, length, 20)
    g = -g.exp()
    with torch.no_grad():
        assert has_short_scan(q, k, v)
        for fn, given in ((gla_update, (q, k, v, g)), (norm_update, (q, k, v))):
            out, state = fn(None, *given)
            out2, state2 = fn(state, *given)
            with disabled():
                want, before = fn(None, *given)
                want2, after = fn(before, *given)
            for a, b in ((out, want), (out2, want2), (state2.memory, after.memory)):
                assert_close(a, b, 1e-5)


def test_no_kernel_where_a_gradient_is_wanted() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    assert not has_short_scan(q.requires_grad_(), k, v)
    assert not has_short_scan(torch.randn(1, 2, 65, 8))


def test_the_short_scan_passes_torchs_own_checks() -> None:
    q, k, v, g = torch.randn(4, 2, 2, 5, 9)
    state = torch.randn(2, 2, 9, 9)
    for gates in (None, g):
        torch.library.opcheck(torch.ops.manyheads.recurrent_scan, (q, k, v, gates, state))
