"""Observers, scales and rounding: constants, zeros, large and poisoned batches."""

from __future__ import annotations

import pytest
import torch

from manyheads.compress.quamba import (
    AsymmetricObserver,
    MinMaxObserver,
    PercentileObserver,
    absmax_scale,
    fake_quant,
    fake_quant_dynamic,
    quantise,
    quantisers,
)


def test_zeros_have_a_scale_to_divide_by() -> None:
    least = torch.tensor([1e-5 / 127])
    assert torch.equal(absmax_scale(torch.zeros(3, 4)), least)
    for observer in (MinMaxObserver(), PercentileObserver()):
        observer.update(torch.zeros(2, 5))
        assert torch.equal(observer.scale, least)
    assert torch.equal(fake_quant(torch.zeros(3), least), torch.zeros(3))
    assert torch.equal(fake_quant_dynamic(torch.zeros(2, 3), per="token"), torch.zeros(2, 3))


@pytest.mark.parametrize("value", [3.0, -3.0])
def test_a_constant_reads_back(value) -> None:
    x = torch.full((4, 5), value)
    torch.testing.assert_close(fake_quant(x, absmax_scale(x)), x)


def test_the_lowest_code_is_reached_by_saturation_alone() -> None:
    x = torch.tensor([-1.0, 1.0])
    scale = absmax_scale(x)
    assert quantise(x, scale).tolist() == [-127, 127]
    assert quantise(2 * x, scale).tolist() == [-128, 127]


def test_halves() -> None:
    x, one = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5]), torch.ones(1)
    assert quantise(x, one).tolist() == [0, 2, 2, 0, -2]
    assert quantise(x, one, half_away=True).tolist() == [1, 2, 3, -1, -3]


@pytest.mark.parametrize("make", [MinMaxObserver, PercentileObserver, AsymmetricObserver])
def test_a_nan_raises_and_leaves_no_trace(make) -> None:
    observer = make()
    observer.update(torch.tensor([1.0, -2.0]))
    before = observer.scale
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            observer.update(torch.tensor([1.0, bad]))
    assert torch.equal(observer.scale, before)
    with pytest.raises(ValueError, match="nothing was observed"):
        _ = make().scale
    with pytest.raises(ValueError, match="NaN or infinity"):
        absmax_scale(torch.tensor([float("nan")]))


def test_the_percentile_moves_from_the_first_batch() -> None:
    a, b = torch.linspace(-1, 1, 101), torch.linspace(0, 4, 101)
    observer = PercentileObserver(0.5)
    observer.update(a)
    observer.update(b)
    wanted = a.abs().median() + 0.01 * (b.median() - a.abs().median())
    torch.testing.assert_close(observer.largest, wanted)
    other = PercentileObserver(0.5)
    other.update(b)
    other.update(a)
    assert other.largest > 1.5 * observer.largest  # the order matters
    with pytest.raises(ValueError, match="alpha 0 must lie"):
        PercentileObserver(0)


@pytest.mark.parametrize("alpha", [0.5, 0.99, 0.99999, 1.0])
@pytest.mark.parametrize("count", [1, 2, 101, 999])
def test_quantiles_of_what_torch_has_no_room_for(monkeypatch, alpha, count) -> None:
    x = torch.rand(count)
    monkeypatch.setattr(quantisers, "_SORTED", 1)
    torch.testing.assert_close(quantisers._quantile(x, alpha), torch.quantile(x, alpha))


def test_bits_and_parts() -> None:
    x = torch.randn(3, 5, 7)
    for per in ("tensor", "sample", "token"):
        for bits in (2, 4, 8):
            read = fake_quant_dynamic(x, per=per, bits=bits)
            assert (read - x).abs().max() <= x.abs().max() / (2 ** (bits - 1) - 1) / 2 + 1e-6
    with pytest.raises(ValueError, match="none of: tensor, sample, token"):
        fake_quant_dynamic(x, per="row")
    with pytest.raises(ValueError, match="bits 9"):
        absmax_scale(x, bits=9)
