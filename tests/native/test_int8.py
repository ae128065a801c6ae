"""The int8 kernels against 64-bit integers, and against the PyTorch forms code by code."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from manyheads.native import disabled, int8_encode, int8_float_linear, int8_linear, library
from manyheads.native.int8 import ops
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
        offset = torch.randint(-9999, 9999, (outputs,), generator=draw, dtype=torch.int32)
        for scale, b, r, o, as_codes in product(
            (torch.tensor([size]), each), (None, bias), (None, row_scale), (None, offset),
            (True, False),
        ):  # fmt: skip
            options = {"bias": b, "row_scale": r, "offset": o, "codes": as_codes}
            y = int8_linear(x, w, scale, **options)
            with disabled():
                assert torch.equal(y, int8_linear(x, w, scale, **options))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_products(shape, threads) -> None:
    compare(*shape, threads=threads)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("shape", [(37, 77, 33), (16, 64, 16), (19, 1, 5), (150, 301, 70)], ids=str)
def test_many_rows_by_either_product(shape, vnni, monkeypatch) -> None:
    """PyTorch's product and the kernel's own take turns; the wrong one would give other numbers."""
    if vnni and not ops._one_instruction():
        pytest.skip("the processor has no 8-bit products")
    monkeypatch.setattr(ops, "_one_instruction", lambda: vnni)
    compare(*shape, threads=2)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40), inputs=st.integers(1, 300), outputs=st.integers(1, 70),
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


def _float_options(outputs: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    bias = torch.randn(outputs, generator=draw)
    fixed = {"input_scale": torch.tensor(0.021), "input_zero": torch.tensor(-93, dtype=torch.int32)}
    return [
        {},
        {"bias": bias},
        fixed,
        {"bias": bias, **fixed},
        {"input_scale": torch.tensor([0.3])},
    ]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40), inputs=st.integers(1, 200), outputs=st.integers(1, 70),
    seed=st.integers(0, 1000), one=st.booleans(),
)  # fmt: skip
def test_floats_are_encoded_as_pytorch_encodes_them(rows, inputs, outputs, seed, one) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = (torch.randn(inputs + 2, rows, generator=draw) * 3)[2:].mT  # rows are not contiguous
    w = codes(outputs, inputs, seed=seed)
    scale = torch.rand(1 if one else outputs, generator=draw) * 0.01
    for options in _float_options(outputs, seed):
        y = int8_float_linear(x, w, scale, **options)
        with disabled():
            assert torch.equal(y, int8_float_linear(x, w, scale, **options))
        assert y.shape == (rows, outputs)


def test_a_float_row_is_its_codes_times_its_scale() -> None:
    """The codes, the zero point and the scales by hand, in float64."""
    x, w = torch.randn(3, 5, 37), codes(23, 37)
    scale, bias = torch.rand(23) * 0.01, torch.randn(23)
    own = x.abs().amax(-1, keepdim=True) / 127
    wanted = ((x / own).round() * own).double() @ (w * scale[:, None]).double().mT + bias
    y = int8_float_linear(x, w, scale, bias=bias)
    torch.testing.assert_close(y, wanted.float(), rtol=1e-5, atol=1e-5)
    step, zero = torch.tensor(0.03), torch.tensor(-40, dtype=torch.int32)
    q = ((x / step).round() + zero).clamp(-128, 127) - zero
    assert int(q.max()) > 90, "some numbers are cut off"
    wanted = (q * step).double() @ (w * scale[:, None]).double().mT + bias
    y = int8_float_linear(x, w, scale, bias=bias, input_scale=step, input_zero=zero)
    torch.testing.assert_close(y, wanted.float(), rtol=1e-5, atol=1e-5)
    known = {"input_scale": step, "input_zero": zero, "weight_sums": w.sum(1, dtype=torch.int32)}
    assert torch.equal(int8_float_linear(x, w, scale, bias=bias, **known), y)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("rows", [2, 20])
def test_a_row_that_is_no_number_stays_one_and_spoils_no_other(kernel, rows) -> None:
    x, w = torch.randn(rows, 37), codes(5, 37)
    x[1, 20], scale = float("nan"), torch.ones(1)
    with nullcontext() if kernel else disabled():
        y = int8_float_linear(x, w, scale)
        assert y[1].isnan().all()
        assert torch.equal(y[0], int8_float_linear(x[:1], w, scale)[0])
        x[1, 20] = float("inf")
        assert not int8_float_linear(x, w, scale)[1].isfinite().any()
        assert not int8_float_linear(torch.zeros(1, 37), w, scale).any()


def test_halves_of_floats_go_to_even() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 254.0]])  # the last makes the scale 2
    one = torch.eye(6, dtype=torch.int8)
    wanted = [[0.0, 2.0, 2.0, 0.0, -2.0, 254.0]]
    y = int8_float_linear(2 * x.clamp_max(127), one, torch.ones(1))
    assert y.tolist() == [[0.0, 4.0, 4.0, 0.0, -4.0, 254.0]]
    y = int8_float_linear(x, one, torch.ones(1), input_scale=torch.ones(1))
    assert y.tolist() == [[*wanted[0][:5], 127.0]]


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
    with pytest.raises(ValueError, match=r"offset is torch.float32 \(3,\), expected torch.int32"):
        int8_linear(x, w, s, offset=torch.ones(3))
    floats, zero = torch.randn(2, 8), torch.tensor(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"must be float32 and int8, got torch\.int8"):
        int8_float_linear(x, w, s)
    with pytest.raises(ValueError, match="input_zero is a code of input_scale's"):
        int8_float_linear(floats, w, s, input_zero=zero)
    with pytest.raises(ValueError, match=r"input_scale is torch.float32 \(2,\)"):
        int8_float_linear(floats, w, s, input_scale=torch.ones(2))
    sums = torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"weight_sums is torch.int32 \(2,\)"):
        int8_float_linear(floats, w, s, input_scale=s, input_zero=zero, weight_sums=sums)
    with pytest.raises(ValueError, match="x and scale must be float32"):
        int8_encode(torch.ones(2).double(), s)


def test_the_operators_pass_torchs_own_checks() -> None:
    args = (codes(5, 9), codes(3, 9), torch.ones(1), torch.ones(3), None, None, True)
    torch.library.opcheck(torch.ops.manyheads.int8_linear, args)
    torch.library.opcheck(torch.ops.manyheads.int8_encode, (torch.randn(3, 4), torch.ones(1)))
    rows = (torch.randn(5, 9), codes(3, 9), torch.ones(3), torch.ones(3))
    for rest in ((None, None, None), (torch.ones(1), torch.ones((), dtype=torch.int32), None)):
        torch.library.opcheck(torch.ops.manyheads.int8_float_linear, (*rows, *rest))
