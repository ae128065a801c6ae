"""The prefix softmax's kernels against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention import AarenAttention, AarenConfig
from manyheads.attention.aaren import AarenState, prefix_attention
from manyheads.attention.aaren.definition import prefix_step
from manyheads.native import disabled, library
from native.calls_prefix import SHAPES, inputs

pytestmark = pytest.mark.skipif(
    library("prefix") is None, reason="no C++ compiler: there are no kernels to test"
)


def run(given, implementation: str, *, started: bool, mask):
    """Outputs, the last state, and gradients from both of everything but the first m.

    That one is a constant to autograd: outputs do not depend on it.
    """
    leaves = [t.detach().clone().requires_grad_() for t in given]
    state = AarenState(leaves[2].detach(), *leaves[3:]) if started else None
    out, after = prefix_attention(
        leaves[0], leaves[1], state=state, mask=mask, implementation=implementation
    )
    generator = torch.Generator().manual_seed(1)
    total = out.new_zeros(())
    for t in (out, after.u, after.w):
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        total = total + (t * weight.to(t)).sum()
    wanted = [*leaves[:2], *(leaves[3:] if started else ())]
    return [out.detach(), *(t.detach() for t in after), *torch.autograd.grad(total, wanted)]


# After the outputs and the three tensors of the state, gradients.
_OF_SCORES, _OF_NORMALISER = 4, 6


def compare(shape, *, started: bool = True, masked: bool = False, **options) -> None:
    # Both sides see the same numbers: rounding a score of ten thousand changes its weight.
    given = [t.float().double() for t in inputs(shape, **options)]
    mask = None
    if masked:
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(shape[0], shape[2], generator=generator) > 0.3
    wanted = run(given, "scan", started=started, mask=mask)
    own = run([t.float() for t in given], "native", started=started, mask=mask)
    for index, (a, b) in enumerate(zip(own, wanted, strict=True)):
        if b.numel():
            # A row without a real token has m = -inf.
            assert torch.equal(a == -torch.inf, b == -torch.inf), index
            a, b = (t.masked_fill(t == -torch.inf, 0).double() for t in (a, b))
            # Two gradients are differences that may leave next to nothing of their terms, v · dv
            # of a score and do · o / u of the normaliser, of the order of one: what rounding may
            # do follows from the terms.
            floor = 0.0
            if index == _OF_SCORES:
                terms = (given[1].abs() * wanted[_OF_SCORES + 1].abs()).sum(-1)
                floor = float(_rms(terms))
            elif index == _OF_NORMALISER:
                floor = 1.0
            assert torch.isfinite(a).all(), index
            error = float(_rms(a - b)) / max(float(_rms(b)), floor, 1e-30)
            assert error <= 1e-5, f"tensor {index}: {error:.1e}"


def _rms(t: torch.Tensor) -> torch.Tensor:
    return t.square().mean().sqrt()


FULL = [s for s in SHAPES if 0 not in s]


@pytest.mark.parametrize("shape", FULL, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_states_and_gradients(shape, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for started in (True, False):
            compare(shape, started=started)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=50, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 70), st.integers(5, 140)
    ),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    started=st.booleans(),
    masked=st.booleans(),
)  # fmt: skip
def test_any_shape(shape, seed, spread, started, masked) -> None:
    compare(shape, seed=seed, spread=spread, started=started, masked=masked)


def test_nothing_before_the_first_real_token() -> None:
    scores, values = torch.randn(2, 3, 20), torch.randn(2, 3, 20, 24)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6] = False
    mask[1] = False
    out, state = prefix_attention(scores, values, mask=mask, implementation="native")
    assert (out[0, :, :6] == 0).all()
    assert (out[1] == 0).all()
    assert (state.m[1] == -torch.inf).all()
    assert torch.isfinite(out).all()


def test_empty_ones() -> None:
    for shape in ((0, 2, 5, 16), (1, 2, 5, 0), (1, 2, 0, 16)):
        scores, values, *_ = (t.float().requires_grad_() for t in inputs(shape))
        out, _ = prefix_attention(scores, values, implementation="native")
        assert out.shape == shape
        if shape[2]:
            out.sum().backward()


@pytest.mark.parametrize("shape", FULL, ids=str)
def test_a_token(shape) -> None:
    scores, values, *state = inputs(shape)
    with torch.no_grad():
        out, after = prefix_step(
            AarenState(*(t.float() for t in state)), scores[..., 0].float(), values[:, :, 0].float()
        )
        wanted, last = prefix_step(AarenState(*state), scores[..., 0], values[:, :, 0])
    for a, b in zip((out, *after), (wanted, *last), strict=True):
        assert_close(a.double(), b, 1e-5)


def test_graphs_hold_the_operator_and_run_without_kernels() -> None:
    layer, x = AarenAttention(AarenConfig(embed_dim=24, num_heads=3)).eval(), torch.randn(2, 40, 24)
    wanted = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), wanted, 1e-5)
    compiled(x).sum().backward()
    program = torch.export.export(
        layer, (x,), dynamic_shapes=({1: torch.export.Dim("length", min=2, max=4096)},)
    )
    longer = torch.randn(2, 77, 24)
    assert_close(program.module()(longer), layer(longer), 1e-5)
    with disabled():
        assert_close(program.module()(longer), layer(longer), 1e-5)


def test_the_operator_passes_torchs_own_checks() -> None:
    given = [t.float() for t in inputs((2, 2, 9, 20))]
    given = [t if i == 2 else t.requires_grad_() for i, t in enumerate(given)]
    torch.library.opcheck(torch.ops.manyheads.prefix_softmax, (*given, 16, True))


def test_native_is_said_when_it_cannot_be_had() -> None:
    scores, values, *_ = inputs((1, 1, 5, 4))
    with pytest.raises(RuntimeError, match="float32 on the CPU"):
        prefix_attention(scores, values, implementation="native")
