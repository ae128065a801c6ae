"""The short convolutions' kernels against torch's convolution in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.layers.conv import ShortConv
from manyheads.layers.conv_op import short_conv
from manyheads.native import disabled, library
from native.calls_conv import SHAPES, inputs

pytestmark = pytest.mark.skipif(
    library("conv") is None, reason="no C++ compiler: there are no kernels to test"
)


def compare(shape: tuple[int, ...], *, biased: bool = True, **options) -> None:
    """Both of the operator's forms in float32 against autograd in float64."""
    _compare(shape, biased, **options)
    with disabled():
        _compare(shape, biased, **options)


def _compare(shape: tuple[int, ...], biased: bool, **options) -> None:
    wide = [t.requires_grad_() for t in inputs(shape, **options)]
    slim = [t.detach().float().requires_grad_() for t in wide]
    if not biased:
        wide[3:], slim[3:] = [], []
    results = []
    for leaves in (slim, wide):
        y = short_conv(*leaves[:3], leaves[3] if biased else None)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    for name, a, b in zip(("y", "x", "before", "weight", "bias"), *results, strict=False):
        if b.numel():
            assert_close(a.double(), b, 1e-5, name)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] and s[2]], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_and_gradients(shape, biased, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for sliced in (False, True):
            compare(shape, biased=biased, sliced=sliced)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(8, 300), st.integers(1, 6)
    ),
    seed=st.integers(0, 1000),
    sliced=st.booleans(),
)  # fmt: skip
def test_any_shape(shape, seed, sliced) -> None:
    compare(shape, seed=seed, sliced=sliced)


def test_empty_ones() -> None:
    for shape in ((0, 4, 16, 4), (2, 3, 0, 4), (2, 0, 16, 4)):
        x, before, weight, bias = (t.float().requires_grad_() for t in inputs(shape))
        y = short_conv(x, before, weight, bias)
        assert y.shape == x.shape
        y.sum().backward()
        assert (weight.grad == 0).all()


def test_the_layer_is_the_same_without_kernels_and_in_pieces() -> None:
    layer, x = ShortConv(20, 4, bias=True, memory=6), torch.randn(2, 30, 20)
    mask = torch.rand(2, 30) > 0.3
    y, last = layer(x, mask=mask)
    with disabled():
        other, same = layer(x, mask=mask)
    assert_close(y, other, 1e-5)
    assert torch.equal(last, same)
    whole, end = layer(x)
    parts, state = [], layer.init_state(2)
    for cut in x.split((1, 2, 9, 1, 17), 1):
        out, state = layer(cut, state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole, 1e-5)
    assert torch.equal(state, end)


def test_extremes_stay_finite() -> None:
    for factor in (0.0, 1e4, 1e18):
        leaves = [t.float() * factor for t in inputs((2, 33, 40, 4))]
        leaves = [t.requires_grad_() for t in leaves]
        y = short_conv(*leaves)
        assert torch.isfinite(y).all()
        y.sum().backward()
        assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_the_operator_passes_torchs_own_checks() -> None:
    leaves = [t.float().requires_grad_() for t in inputs((2, 5, 7, 3))]
    torch.library.opcheck(torch.ops.manyheads.short_conv, tuple(leaves))
