"""Quantisers, ranges, outliers and the simulation of whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compare import relative_error
from manyheads.compress.quantizable import (
    RangeEstimator,
    Scheme,
    UniformQuantizer,
    inf_norm,
    kurtosis,
    measure_outliers,
    simulate_quantization,
)
from manyheads.compress.quantizable.search import squared_errors
from manyheads.compress.quantizable.simulate import QuantizedModule
from manyheads.models.language.quantizable import (
    QuantizableBERT,
    QuantizableBERTConfig,
    QuantizableOPT,
    QuantizableOPTConfig,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "quantizable"


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 12),
    symmetric=st.booleans(),
    low=st.floats(-50, 0),
    width=st.floats(0.1, 90),
)
def test_inside_the_range_the_error_is_half_a_step(bits, symmetric, low, width) -> None:
    x = torch.linspace(low, low + width, 333, dtype=torch.float64)
    quantizer = UniformQuantizer(bits=bits, symmetric=symmetric).set_range(x.min(), x.max())
    steps = quantizer.to_integers(x)
    assert steps.min() >= quantizer.grid[0]
    assert steps.max() <= quantizer.grid[1]
    # The zero point is rounded too: the end of the range may lie half a step beyond the grid.
    limit = 0.5 if symmetric else 1.0
    assert ((quantizer(x) - x).abs() <= limit * quantizer.scale * (1 + 1e-9)).all()
    assert torch.equal(quantizer(torch.zeros(1).double()), torch.zeros(1).double())


def test_gradients_pass_inside_the_grid_alone() -> None:
    x = torch.tensor([-9.0, -1.0, 0.3, 2.0, 9.0]).requires_grad_()
    quantizer = UniformQuantizer(bits=4).set_range(torch.tensor(-1.5), torch.tensor(2.5))
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_bad_ranges_are_named() -> None:
    with pytest.raises(ValueError, match="bits 1 "):
        UniformQuantizer(bits=1)
    with pytest.raises(ValueError, match="no range yet"):
        UniformQuantizer()(torch.ones(3))
    with pytest.raises(ValueError, match="starts above"):
        UniformQuantizer().set_range(torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="per_channel"):
        UniformQuantizer().set_range(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        RangeEstimator(Scheme()).update(torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="running"):
        Scheme(estimator="runing")


def test_percentiles_act_on_channels_as_well() -> None:
    x = torch.randn(4, 501)
    x[2, 7] = 1000.0
    low, high = RangeEstimator(Scheme(per_channel=True, percentile=99.0)).update(x)
    assert low.shape == high.shape == (4,)
    assert high.max() < 10
    assert (low < high).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_searched_ranges_beat_extremes(symmetric, per_channel) -> None:
    x = torch.randn(5, 300)
    x[0, 0] = 40.0
    error = {}
    for estimator in ("minmax", "mse_grid"):
        scheme = Scheme(bits=4, symmetric=symmetric, per_channel=per_channel, estimator=estimator)
        quantizer = UniformQuantizer(bits=4, symmetric=symmetric, per_channel=per_channel)
        quantizer.set_range(*RangeEstimator(scheme).update(x))
        error[estimator] = float((quantizer(x) - x).square().sum())
    assert error["mse_grid"] < error["minmax"]


def test_golden_sections_reach_the_error_of_the_grid() -> None:
    pytest.importorskip("scipy")
    x = torch.randn(5, 300)
    found = {}
    for estimator in ("mse_grid", "mse_golden"):
        scheme = Scheme(bits=4, symmetric=True, estimator=estimator)
        low, high = RangeEstimator(scheme).update(x)
        errors = squared_errors(x, float(low), float(high), bits=4, symmetric=True)
        found[estimator] = float(errors.sum())
    assert found["mse_golden"] <= 1.02 * found["mse_grid"]
    scheme = Scheme(bits=4, symmetric=True, per_channel=True, estimator="mse_golden")
    assert RangeEstimator(scheme).update(x)[0].shape == (5,)


def test_outliers_are_seen_where_they_are() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.LayerNorm(20), nn.Linear(20, 5))
    x = torch.randn(3, 7, 20)
    with torch.no_grad():
        model[1].weight[4] = 100.0
    found = measure_outliers(model, [{"input": x}])
    assert set(found.inf_norms) == {"0", "1"}
    assert found.max_inf_norm == found.inf_norms["1"] > 100
    assert found.kurtoses["1"] > 3 * found.kurtoses["0"]
    out = model[0](x)
    assert found.inf_norms["0"] == pytest.approx(float(inf_norm(out).mean()))
    assert found.kurtoses["0"] == pytest.approx(float(kurtosis(out).mean()))
    assert 2.5 < float(kurtosis(torch.randn(1, 20000))) < 3.5
    with pytest.raises(ValueError, match="no module matches"):
        measure_outliers(model, [{"input": x}], modules=["*.dense"])
    with pytest.raises(ValueError, match="no batches"):
        measure_outliers(model, [])


def small() -> QuantizableBERT:
    config = QuantizableBERTConfig(
        vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, mlp_width=56, gamma=-0.02,
        init_std=0.15,
    )  # fmt: skip
    return QuantizableBERT(config).eval()


def test_more_bits_are_nearer_and_the_model_is_left_alone() -> None:
    model, batch = small(), {"tokens": torch.randint(61, (2, 11))}
    before = {k: t.clone() for k, t in model.state_dict().items()}
    expected, errors = model(**batch), []
    for bits in (4, 8, 12):
        simulated = simulate_quantization(
            model, [batch], weights=Scheme(bits=bits, symmetric=True),
            activations=Scheme(bits=bits, estimator="running"),
        )  # fmt: skip
        errors.append(relative_error(simulated(**batch), expected))
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_what_is_skipped_stays_and_ranges_stay_fixed() -> None:
    model, batch = small(), {"tokens": torch.randint(61, (2, 11))}
    simulated = simulate_quantization(model, [batch], skip=["head_*", "layers.0.*"])
    kinds = {p for p, m in simulated.named_modules() if isinstance(m, QuantizedModule)}
    assert not any(p.startswith(("head", "layers.0")) for p in kinds)
    assert "layers.1.fc1" in kinds
    first = simulated(**batch)
    simulated(tokens=torch.randint(61, (2, 5)))
    assert torch.equal(simulated(**batch), first)
    with pytest.raises(ValueError, match="skip 'heads' matches no module"):
        simulate_quantization(model, [batch], skip=["heads"])
    with pytest.raises(ValueError, match="no batches"):
        simulate_quantization(model, [])


def small_opt() -> QuantizableOPT:
    config = QuantizableOPTConfig(
        vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, mlp_width=56, max_positions=40,
        init_std=0.15,
    )  # fmt: skip
    return QuantizableOPT(config).eval()


@torch.no_grad()
def test_the_tied_head_is_quantised_where_it_is_asked_for() -> None:
    """The official set-ups "fp32_head" and "all": one model but for what follows the last norm."""
    model, batch = small_opt(), {"tokens": torch.randint(61, (2, 11))}
    usual = simulate_quantization(model, [batch])
    every = simulate_quantization(model, [batch], tied_head=True)
    seen = []
    every.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    logits, codes = every(**batch), UniformQuantizer(symmetric=True)
    codes.set_range(*model.embed.weight.aminmax())
    raw = nn.functional.linear(seen[0], codes(model.embed.weight))
    wanted = UniformQuantizer().set_range(*raw.aminmax())(raw)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    assert len(logits.unique()) <= 256 < len(usual(**batch).unique())
    plain = nn.functional.linear(seen[0], model.embed.weight)
    torch.testing.assert_close(usual(**batch), plain, rtol=1e-5, atol=1e-5)
    state = every.update(batch["tokens"], every.init_state(2))[0]
    assert len(state.unique()) <= 256, "streaming runs through it as well"
    with pytest.raises(ValueError, match="QuantizableBERT has no tied head"):
        simulate_quantization(small(), [batch], tied_head=True)


@torch.no_grad()
@pytest.mark.parametrize("norms", ["norm", "*norm"])
def test_norms_of_sixteen_bits(norms) -> None:
    """The official "fp32_head+int16_final_LN" and "+int16_all_LN": weight and output alike."""
    model, batch = small_opt(), {"tokens": torch.randint(61, (2, 11))}
    model.norm.weight.copy_(torch.randn(32).exp())
    model.norm.weight[3] = 40.0
    simulated = simulate_quantization(model, [batch], bits={norms: 16})
    wide = {
        path for path, m in simulated.named_modules()
        if isinstance(m, QuantizedModule) and m.output is not None
        and m.weight_quantizer.bits == m.output.quantizer.bits == 16
    }  # fmt: skip
    layers = {f"layers.{i}.{n}_norm" for i in range(2) for n in ("attention", "mlp")}
    assert wide == ({"norm"} if norms == "norm" else {"norm", *layers})
    errors = []
    for made in (simulated, simulate_quantization(model, [batch])):
        seen = []
        made.norm.register_forward_hook(lambda _, args, out, seen=seen: seen.extend((*args, out)))
        made(**batch)
        errors.append(relative_error(seen[1], model.norm(seen[0])))
    assert 0 < errors[0] < 0.02 * errors[1]
    with pytest.raises(ValueError, match="bits 'norms' matches no module"):
        simulate_quantization(model, [batch], bits={"norms": 16})
    with pytest.raises(ValueError, match="bits 17 must lie between 2 and 16"):
        simulate_quantization(model, [batch], bits={"norm": 17})


def test_ranges_are_the_official_ones() -> None:
    """Every scale, zero point and sign of the official tiny BERT, not its logits alone."""
    from safetensors import safe_open

    path = GOLDEN / "bert_mlm_clipped_w8a8.safetensors"
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    model = QuantizableBERT(QuantizableBERTConfig.from_official(json.loads(meta["config"])))
    model.load_official({k[2:]: t for k, t in tensors.items() if k.startswith("w.")})
    ids = tensors["in.calibration_ids"]
    simulated = simulate_quantization(
        model, [{"tokens": t, "mask": torch.ones_like(t)} for t in ids], skip=["head_*"]
    )
    names = {
        "embed_norm": "bert.embeddings.LayerNorm",
        "layers.1.attention.q_proj": "bert.encoder.layer.1.attention.self.query",
        "layers.0.fc1": "bert.encoder.layer.0.intermediate.0",
        "layers.1.mlp_norm": "bert.encoder.layer.1.output.LayerNorm",
    }
    taps = {
        "type_tap": "bert.embeddings.sum_input_token_type_embd_act_quantizer",
        "layers.1.attention.scores_tap": (
            "bert.encoder.layer.1.attention.self.attn_scores_act_quantizer"
        ),
        "layers.1.attention.context_tap": (
            "bert.encoder.layer.1.attention.self.context_act_quantizer"
        ),
        "layers.1.mlp_tap": "bert.encoder.layer.1.output.res_act_quantizer",
    }
    ranges = json.loads(meta["quant_ranges"])
    for ours, theirs in names.items():
        module = simulated.get_submodule(ours)
        scale, _, signed = ranges[f"{theirs}.weight_quantizer"]
        assert float(module.weight_quantizer.scale) == pytest.approx(scale, rel=1e-6)
        assert module.weight_quantizer.signed == signed
    for ours, theirs in (names | taps).items():
        module = simulated.get_submodule(ours)
        quantizer = (module.output if ours in names else module).quantizer
        scale, zero, _ = ranges[f"{theirs}.activation_quantizer"]
        assert float(quantizer.scale) == pytest.approx(scale, rel=1e-5), ours
        assert float(quantizer.zero_point) == zero, ours
