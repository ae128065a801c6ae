"""The pooling kernel against norms and pooling in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compare import assert_close
from manyheads.layers.pool_norm import pool_norm
from manyheads.native import disabled, library
from native.calls_pool import SHAPES, inputs

pytestmark = pytest.mark.skipif(
    library("pool") is None, reason="no C++ compiler: there are no kernels to test"
)


def definition(
    x: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Two norms and a pooling as a block has them, with a shift in the first norm too."""
    normed = F.group_norm(x, 1, gain, bias, 1e-5)
    pooled = F.avg_pool2d(normed, window, 1, window // 2, count_include_pad=False)
    mixed = x + pooled - normed
    return mixed, F.group_norm(mixed, 1, weight, bias, 1e-3)


@torch.no_grad()
def compare(shape: tuple[int, ...], **options) -> None:
    """The kernel, PyTorch's form in its place, and what runs with gradients."""
    wide = inputs(shape, **options)
    slim = [t.float() for t in wide]
    expected = definition(*wide, shape[4])
    last = slim[0].contiguous(memory_format=torch.channels_last)
    known = {"window": shape[4], "eps": 1e-5, "eps_after": 1e-3}
    found = [pool_norm(*slim, **known), pool_norm(last, *slim[1:], **known)]
    with disabled():
        found.append(pool_norm(*slim, **known))
    with torch.enable_grad():
        found.append(pool_norm(*slim, **known))
    for pair in found:
        for name, a, b in zip(("mixed", "normed"), pair, expected, strict=True):
            assert a.is_contiguous(memory_format=torch.channels_last)
            assert_close(a.double(), b, 1e-5, name)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0]], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs(shape, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(shape)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 70), st.integers(2, 12), st.integers(2, 12),
        st.sampled_from((1, 3, 5)),
    ),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(shape, seed) -> None:
    compare(shape, seed=seed)


def test_a_mean_far_from_zero_costs_no_digits_of_the_spread() -> None:
    shape = (2, 24, 9, 11, 3)
    # 1000 itself is exact to 6e-5 in float32: that is what of the spread of 1 is lost before.
    wide = [t.float().double() for t in inputs(shape, mean=1000.0)]
    with torch.no_grad():
        found = pool_norm(*(t.float() for t in wide), window=3, eps=1e-5, eps_after=1e-3)
    for a, b in zip(found, definition(*wide, 3), strict=True):
        assert_close(a.double() - b.mean(), b - b.mean(), 1e-4)


def test_empty_and_constant_maps() -> None:
    with torch.no_grad():
        leaves = [t.float() for t in inputs((0, 8, 4, 4, 3))]
        for out in pool_norm(*leaves, window=3, eps=1e-5, eps_after=1e-5):
            assert out.shape == (0, 8, 4, 4)
        ones = torch.ones(1, 5, 4, 6)
        mixed, normed = pool_norm(
            ones, ones[0, :, 0, 0], ones[0, :, 0, 0], ones[0, :, 0, 0],
            window=3, eps=1e-5, eps_after=1e-5,
        )  # fmt: skip
    assert_close(mixed, ones, 1e-5)
    assert_close(normed, ones, 1e-5)


def test_the_operator_passes_torchs_own_checks() -> None:
    leaves = [t.float() for t in inputs((2, 7, 5, 3, 3))]
    torch.library.opcheck(torch.ops.manyheads.pool_norm, (*leaves, 3, 1e-5, 1e-5))
