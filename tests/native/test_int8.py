"""The int8 kernels against 64-bit integers, and against the PyTorch forms code by code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.native import disabled, int8_encode, int8_linear, library
from native.calls_int8 import SHAPES, codes

pytestmark = pytest.mark.skipif(
    library("int8") is None, reason="no C++ compiler: there are no kernels to test"
)


def compare(rows: int, inputs: int, outputs: int, *, seed: int = 0, threads: int = 1) -> None:
    x, w = codes(rows, inputs + 3, seed=seed)[:, 3:], codes(outputs, inputs, seed=seed + 1)
    exact = x.long() @ w.long().mT
    one = torch.ones(1)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(int8_linear(x, w, one).long(), exact.float().long())
        draw = torch.Generator().manual_seed(seed)
        size = 100 / max(float(exact.abs().max()) if exact.numel() else 1.0, 1.0)
        each = torch.rand(outputs, generator=draw) * 2 * size
        bias = torch.randn(outputs, generator=draw) * 20
        row_scale = torch.rand(rows, generator=draw)
        for scale in (torch.tensor([size]), each):
            for b in (None, bias):
                for r in (None, row_scale):
                    for as_codes in (True, False):
                        options = {"bias": b, "row_scale": r, "codes": as_codes}
                        y = int8_linear(x, w, scale, **options)
                        with disabled():
                            plain = int8_linear(x, w, scale, **options)
                        if as_codes:
                            assert torch.equal(y, plain)
                        else:
                            torch.testing.assert_close(y, plain, rtol=1e-6, atol=1e-4)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_products(shape, threads) -> None:
    compare(*shape, threads=threads)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 13), inputs=st.integers(1, 300), outputs=st.integers(1, 70),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(rows, inputs, outputs, seed) -> None:
    compare(rows, inputs, outputs, seed=seed)


def test_the_sums_do_not_saturate() -> None:
    """The instruction for 8-bit products has a form that clips sums at 16 bits: not this one."""
    for a, b in ((-128, -128), (-128, 127), (127, -128), (127, 127)):
        x = torch.full((5, 4096), a, dtype=torch.int8)
        w = torch.full((17, 4096), b, dtype=torch.int8)
        assert (int8_linear(x, w, torch.ones(1)) == a * b * 4096).all()


def test_halves_go_away_from_zero_and_codes_are_clamped() -> None:
    x = torch.tensor([0.5, -0.5, 1.5, 2.5, -2.5, 0.49999997, 127.5, 1e9, -1e9, -128.5])
    wanted = torch.tensor([1, -1, 2, 3, -3, 0, 127, 127, -128, -128], dtype=torch.int8)
    assert torch.equal(int8_encode(x, torch.ones(1)), wanted)
    with disabled():
        assert torch.equal(int8_encode(x, torch.ones(1)), wanted)
    one = torch.ones(1, 1, dtype=torch.int8)
    rows = torch.tensor([[1], [-1], [3], [127]], dtype=torch.int8)
    assert int8_linear(rows, one, torch.tensor([0.5]), codes=True).flatten().tolist() == [
        1, -1, 2, 64
    ]  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(1e-4, 1.0), seed=st.integers(0, 1000))
def test_codes_are_those_of_pytorch(scale, seed) -> None:
    x = torch.randn(1031, generator=torch.Generator().manual_seed(seed)) * 50 * scale
    s = torch.tensor([scale])
    with disabled():
        plain = int8_encode(x, s)
    assert torch.equal(int8_encode(x, s), plain)


def test_what_does_not_fit_is_named() -> None:
    x, w, s = codes(2, 8), codes(3, 8), torch.ones(1)
    with pytest.raises(ValueError, match="must be int8"):
        int8_linear(x.float(), w, s)
    with pytest.raises(ValueError, match=r"do not fit: need \(..., K\)"):
        int8_linear(codes(2, 7), w, s)
    with pytest.raises(ValueError, match=r"scale is torch.float32 \(2,\)"):
        int8_linear(x, w, torch.ones(2))
    with pytest.raises(ValueError, match="bias is torch"):
        int8_linear(x, w, s, bias=torch.ones(3).half())
    with pytest.raises(ValueError, match=r"row_scale is torch.float32 \(3,\)"):
        int8_linear(x, w, s, row_scale=torch.ones(3))
    with pytest.raises(ValueError, match="x and scale must be float32"):
        int8_encode(torch.ones(2).double(), s)


def test_the_operators_pass_torchs_own_checks() -> None:
    args = (codes(5, 9), codes(3, 9), torch.ones(1), torch.ones(3), None, True)
    torch.library.opcheck(torch.ops.manyheads.int8_linear, args)
    torch.library.opcheck(torch.ops.manyheads.int8_encode, (torch.randn(3, 4), torch.ones(1)))
