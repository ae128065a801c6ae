"""The int8 and the simulated block: against each other, in pieces, padded, packed, poisoned."""

from __future__ import annotations

import logging

import pytest
import torch

from manyheads.attention import MambaConfig, MambaMixer
from manyheads.compress.quamba import (
    Int8Mamba,
    SimulatedMamba,
    calibrate_block,
    fake_quant,
    hadamard_transform,
)
from manyheads.native import disabled
from native.calls_int8 import BLOCKS, block


def near(a: torch.Tensor, b: torch.Tensor, *, steps: float = 2, share: float = 0.02) -> None:
    """Codes at ties may differ by a step: few, and by little."""
    apart = (a.float() - b.float()).abs()
    unit = b.float().abs().max() / 127
    assert apart.max() <= steps * unit, (apart.max() / unit).item()
    assert (apart > unit * 0.02).float().mean() <= share


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_kernels_and_pytorch_give_the_same_codes(shape) -> None:
    _, small = block(shape)
    x = torch.randn(2, 21, shape[0])
    y, state, seen = small.trace(x, small.init_state(2))
    with disabled():
        plain, other, codes = small.trace(x, small.init_state(2))
    assert torch.equal(seen["input"], codes["input"])
    assert torch.equal(seen["in_proj"], codes["in_proj"])
    for name in ("u", "x_proj", "dt_proj", "y"):
        apart = (seen[name].int() - codes[name].int()).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() < 0.01
    near(y, plain, steps=3)
    assert torch.equal(state.conv, other.conv)
    torch.testing.assert_close(state.ssm, other.ssm, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("shape", BLOCKS, ids=str)
@pytest.mark.parametrize("kernels", [True, False])
def test_steps_and_pieces_equal_the_whole(shape, kernels) -> None:
    _, small = block(shape)
    x = torch.randn(3, 17, shape[0])

    def run() -> None:
        whole, end = small.update(x, small.init_state(3))
        near(small(x), whole)
        state, parts = small.init_state(3), []
        for cut in x.split((1, 2, 9, 5), 1):
            out, state = small.update(cut, state)
            parts.append(out)
        near(torch.cat(parts, 1), whole)
        state, steps = small.init_state(3), []
        for token in x.unbind(1):
            out, state = small.step(token, state)
            steps.append(out)
        near(torch.stack(steps, 1), whole, steps=3)
        assert torch.equal(state.conv, end.conv)
        torch.testing.assert_close(state.ssm, end.ssm, atol=0.02, rtol=0.02)

    if kernels:
        run()
    else:
        with disabled():
            run()


def test_a_step_leaves_its_state_alone() -> None:
    _, small = block(BLOCKS[0])
    x = torch.randn(2, 8)
    _, state = small.step(x, small.init_state(2))
    kept = [t.clone() for t in state]
    first = small.step(x, state)[0]
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert torch.equal(small.step(x, state)[0], first)


@pytest.mark.parametrize("form", ["int8", "simulate"])
def test_padding_and_packing_change_no_real_token(form) -> None:
    made, small = block(BLOCKS[0])
    if form == "simulate":
        scales = calibrate_block(made, [torch.randn(1, 40, 8)], percentile=None)
        small = SimulatedMamba.from_float(made, scales)
    lengths = (9, 1, 6)
    rows = [torch.randn(n, 8) for n in lengths]
    alone = [small(r[None])[0] for r in rows]
    for side in ("left", "right"):
        x, mask = torch.full((3, 9, 8), 50.0), torch.zeros(3, 9, dtype=torch.bool)
        for i, row in enumerate(rows):
            at = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
            x[i, at], mask[i, at] = row, True
        y, state = small.update(x, small.init_state(3), mask=mask)
        for i, wanted in enumerate(alone):
            near(y[i][mask[i]], wanted)
            end = small.update(rows[i][None], small.init_state(1))[1]
            assert torch.equal(state.conv[i], end.conv[0])
            torch.testing.assert_close(state.ssm[i], end.ssm[0], atol=1e-4, rtol=1e-4)
    packed = small(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 9, 10, 16]))
    near(packed[0], torch.cat(alone))
    with pytest.raises(ValueError, match="mask or cu_seqlens"):
        small(x, mask=mask, cu_seqlens=torch.tensor([0, 9]))


def test_int8_and_simulation_agree_within_a_few_steps() -> None:
    made = MambaMixer(MambaConfig(embed_dim=48)).eval()
    seen, x = [torch.randn(1, 200, 48)], torch.randn(2, 50, 48)
    scales = calibrate_block(made, seen)
    a = Int8Mamba.from_float(made, scales)(x)
    b = SimulatedMamba.from_float(made, scales)(x)
    y = made(x)
    step = y.abs().max() / 127
    assert (a - b).abs().max() < 6 * step
    for quantised in (a, b):
        error = (quantised - y).square().mean().sqrt() / y.square().mean().sqrt()
        assert error < 0.05


def test_rotation_halves_the_error_that_an_outlier_channel_causes() -> None:
    """One channel of the scan's output 30 times the others: naive codes drown the rest."""
    y = torch.randn(400, 96)
    y[:, 17] *= 30
    weight = torch.randn(24, 96)
    weight[:, 17] /= 30
    wanted = y @ weight.mT

    def error(a: torch.Tensor, w: torch.Tensor) -> float:
        read = fake_quant(a, a.abs().amax().reshape(1) / 127)
        return float((read @ w.mT - wanted).norm() / wanted.norm())

    rotated = error(hadamard_transform(y), hadamard_transform(weight))
    assert rotated < 0.5 * error(y, weight)


def test_clipping_rare_large_inputs_lowers_the_squared_error() -> None:
    u = torch.randn(40_000)
    u[::20_000] = 20.0
    clipped = torch.quantile(u.abs(), 0.9999).reshape(1) / 127
    whole = u.abs().amax().reshape(1) / 127
    small = u.abs() < 5

    def error(scale: torch.Tensor) -> float:
        return float((fake_quant(u, scale) - u)[small].square().mean())

    assert error(clipped) < error(whole)


def test_a_block_with_zeros_everywhere_stays_finite() -> None:
    made = MambaMixer(MambaConfig(embed_dim=8)).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    scales = calibrate_block(made, [torch.zeros(1, 5, 8)])
    assert all(s >= 1e-5 / 127 for s in scales.values())
    for small in (Int8Mamba.from_float(made, scales), SimulatedMamba.from_float(made, scales)):
        assert torch.equal(small(torch.zeros(2, 3, 8)), torch.zeros(2, 3, 8))
        assert torch.isfinite(small(torch.randn(2, 3, 8))).all()


def test_a_width_without_rotation_raises_with_the_bases_or_goes_without() -> None:
    made = MambaMixer(MambaConfig(embed_dim=11)).eval()
    with pytest.raises(ValueError, match=r"size 22 has no Hadamard.*172.*hadamard=False"):
        calibrate_block(made, [torch.randn(1, 5, 11)])
    scales = calibrate_block(made, [torch.randn(1, 50, 11)], hadamard=False)
    with pytest.raises(ValueError, match="size 22"):
        Int8Mamba.from_float(made, scales)
    x = torch.randn(1, 20, 11)
    y = Int8Mamba.from_float(made, scales, hadamard=False)(x)
    assert (y - made(x)).norm() / made(x).norm() < 0.1


def test_a_nan_in_the_calibration_raises() -> None:
    made = MambaMixer(MambaConfig(embed_dim=8)).eval()
    bad = torch.randn(1, 5, 8)
    bad[0, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        calibrate_block(made, [torch.randn(1, 5, 8), bad])
    with pytest.raises(ValueError, match="nothing was observed"):
        calibrate_block(made, [])


def test_a_low_percentile_is_warned_of(caplog) -> None:
    made = MambaMixer(MambaConfig(embed_dim=8)).eval()
    with caplog.at_level(logging.WARNING, "manyheads"):
        calibrate_block(made, [torch.randn(1, 5, 8)], percentile=0.98)
        calibrate_block(made, [torch.randn(1, 5, 8)], percentile=0.9995)
    (record,) = caplog.records
    assert "clips one input of the scan in 50" in record.getMessage()


def test_scales_stay_float32_and_weights_int8() -> None:
    _, small = block(BLOCKS[0])
    before = small.scales.clone()
    small.half()
    assert torch.equal(small.scales, before)
    assert small.weight_scales.dtype == torch.float32
    assert small.in_proj.dtype == torch.int8
    assert small(torch.randn(1, 4, 8).half()).dtype == torch.float16
    assert not list(small.parameters())


def test_a_block_is_one_graph() -> None:
    _, small = block(BLOCKS[0])
    x, state = torch.randn(2, 9, 8), small.init_state(2)
    whole = torch.compile(small, fullgraph=True, backend="aot_eager")
    step = torch.compile(small.step, fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(x), small(x))
    assert torch.equal(step(x[:, 0], state)[0], small.step(x[:, 0], state)[0])
