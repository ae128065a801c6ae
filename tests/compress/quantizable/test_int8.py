"""INT8 in earnest: bytes fall, folders load, outputs stay near, what is tied or odd is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compare import relative_error
from compress.families import FAMILIES, batches, build, output
from manyheads.compress import Plan, get_procedure, load_model, save_model
from manyheads.compress.quantizable import Int8, Int8Linear
from manyheads.compress.steps import describe, record_step
from manyheads.native import disabled

pytest.importorskip("transformers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inputs", ["per_token", "static"])
def test_every_family(family: str, inputs: str) -> None:
    model, data = build(family, layers=2), batches(family)
    expected = output(model, data[0])
    plan = Int8(inputs=inputs).plan(model, data)
    smaller = plan.apply(model)
    found = relative_error(output(smaller, data[0]), expected)
    assert 0 < found < 0.12
    assert plan.measured["relative_error"] == pytest.approx(found, rel=0.02)
    assert torch.equal(output(model, data[0]), expected), "the model given is left alone"
    converted = [m for m in smaller.modules() if isinstance(m, Int8Linear)]
    assert len(converted) == plan.measured["layers"] > 0
    fresh = Int8.restructure(plan.structure, build(family, layers=2, seed=1))
    fresh.load_state_dict(smaller.state_dict(), strict=True)
    assert torch.equal(output(fresh, data[0]), output(smaller, data[0]))


@pytest.mark.parametrize("family", ["bert", "gpt2", "timm", "ours"])
def test_bytes_fall_and_the_folder_loads(family: str, tmp_path: Path) -> None:
    model, data = build(family, layers=2), batches(family)
    plan = Int8(inputs="static").plan(model, data)
    plan.save(tmp_path / "plan.json")
    smaller = Plan.load(tmp_path / "plan.json").apply(model)
    original = describe(model)
    step = {"method": "int8", "structure": plan.structure}
    record_step(smaller, original, [], step)
    folder = save_model(smaller, tmp_path / "small")
    loaded = load_model(folder)
    assert torch.equal(output(loaded, data[0]), output(smaller, data[0]))
    weights = [p for p in smaller.modules() if isinstance(p, Int8Linear)]
    ints = sum(m.weight_int8.numel() for m in weights)
    held = sum(m.weight_int8.element_size() * m.weight_int8.numel() for m in weights)
    assert held == ints
    before, after = plan.measured["weight_bytes"]
    assert before == 4 * ints
    assert after == held + sum(4 * m.out_features for m in weights)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_linear_layer_is_near_and_gives_gradients() -> None:
    torch.manual_seed(3)
    linear, x = nn.Linear(37, 23), torch.randn(2, 5, 37, requires_grad=True)
    layer = Int8Linear.from_float(linear)
    y = layer(x)
    assert relative_error(y, linear(x)) < 0.02
    assert layer.weight_int8.dtype == torch.int8
    assert relative_error(layer.weight, linear.weight) < 0.01
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert relative_error(grad, torch.autograd.grad(linear(x).sum(), x)[0]) < 0.01
    assert relative_error(layer(x.detach()), y) < 1e-6
    half = layer(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), y) < 0.02
    assert layer(torch.zeros(0, 37)).shape == (0, 23)
    assert torch.equal(layer(torch.zeros(1, 37))[0], linear.bias)


@pytest.mark.parametrize("static", [True, False])
def test_the_numbers_are_the_same_without_kernels(static: bool) -> None:
    for inputs, outputs, rows, biased in (
        (37, 23, 0, True),
        (77, 5, 1, False),
        (129, 40, 19, True),
    ):
        linear, wide = (
            nn.Linear(inputs, outputs, bias=biased),
            torch.rand(rows, inputs + 3) * 3 - 0.2,
        )
        x = wide[:, 3:].T.contiguous().T if rows > 1 else wide[:, 3:]
        ends = (torch.tensor(-0.2), torch.tensor(2.5)) if static else None
        layer = Int8Linear.from_float(linear, input_range=ends)
        with torch.no_grad():
            y = layer(x)
            with disabled():
                assert torch.equal(y, layer(x))
        assert torch.equal(y, layer(x)), "a bias that is trained is added outside"
        assert y.shape == (rows, outputs)


@pytest.mark.parametrize("static", [True, False])
def test_it_compiles_whole_with_the_same_numbers(static: bool) -> None:
    x = torch.randn(2, 11, 37)
    ends = (x.min(), x.max()) if static else None
    layer = Int8Linear.from_float(nn.Linear(37, 23), input_range=ends).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_a_bias_learns_beside_an_input_that_does_not() -> None:
    layer, x = Int8Linear.from_float(nn.Linear(37, 23)), torch.randn(5, 37)
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((23,), 5.0))


def test_one_input_is_multiplied_right() -> None:
    """PyTorch's 8-bit product reads a matrix of one column as one of one row."""
    linear, x = nn.Linear(1, 9), torch.randn(20, 1)
    with torch.no_grad():
        assert relative_error(Int8Linear.from_float(linear)(x), linear(x)) < 0.02


def test_a_static_range_has_its_zero_point_taken_out() -> None:
    """Inputs far from symmetric: the correction by the sums of the weights is what is tested."""
    linear, x = nn.Linear(37, 23), torch.rand(50, 37) * 3 - 0.2
    layer = Int8Linear.from_float(linear, input_range=(x.min(), x.max()))
    assert int(layer.input_zero) < -100
    with torch.no_grad():
        assert relative_error(layer(x), linear(x)) < 0.015
        torch.testing.assert_close(layer(x), _by_floats(layer, x), rtol=1e-5, atol=1e-5)


def _by_floats(layer: Int8Linear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(layer._rounded(x), layer.weight, layer.bias)


def test_one_outlier_spoils_a_static_range_and_not_its_neighbours_by_token() -> None:
    linear = nn.Linear(64, 48)
    x = torch.randn(1, 30, 64)
    x[0, 4] *= 300
    errors = {}
    for inputs in ("static", "per_token"):
        plan = Int8(inputs=inputs).plan(nn.Sequential(linear), [{"input": x}])
        out = plan.apply(nn.Sequential(linear))(x)
        rest = torch.arange(30) != 4
        errors[inputs] = relative_error(out[0, rest], linear(x)[0, rest])
    assert errors["per_token"] < 0.02 < 0.2 < errors["static"]


def test_weights_of_least_error_are_no_worse() -> None:
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight[:, 0] = 3.0
    found = {}
    for weights in ("minmax", "mse"):
        plan = Int8(weights=weights).plan(nn.Sequential(linear))
        layer = plan.apply(nn.Sequential(linear))[0]
        found[weights] = float((layer.weight - linear.weight).square().sum())
    assert found["mse"] <= found["minmax"]


def test_what_cannot_be_converted_is_said() -> None:
    model, data = build("gpt2", layers=2), batches("gpt2")
    plan = Int8(skip=("transformer.h.0.*",)).plan(model, data)
    assert plan.measured["left"]["lm_head"] == "tied to another layer"
    assert plan.measured["left"]["transformer.h.0.mlp.c_fc"] == "skip"
    assert not any(p.startswith("transformer.h.0.") for p in plan.structure["layers"])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    assert "0.out_proj" in Int8().plan(attention).measured["left"]
    for options, words in (
        ({"skip": ("nothing",)}, "matches no module"),
        ({"inputs": "tokens"}, "per_token"),
        ({"percentile": 99.0}, "static"),
    ):
        with pytest.raises(ValueError, match=words):
            Int8(**options).plan(model, data)
    with pytest.raises(ValueError, match="calibration"):
        Int8(inputs="static").plan(model)
    with pytest.raises(ValueError, match="no linear layer"):
        Int8().plan(nn.Sequential(nn.LayerNorm(4)))


def test_layers_that_are_slower_here_are_named_and_can_be_left(monkeypatch) -> None:
    from manyheads.compress.quantizable import method

    def compare(before: nn.Module, after: nn.Module, x: torch.Tensor) -> tuple[float, float]:
        return (1.0, 2.0) if after.in_features == 8 else (2.0, 1.0)

    monkeypatch.setattr(method, "_compare", compare)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5))
    plan = Int8().plan(model)
    assert plan.measured["slower"] == ["0"]
    assert plan.measured["notes"]
    assert set(Int8(keep_slower=False).plan(model).structure["layers"]) == {"1"}


def test_it_is_registered() -> None:
    assert get_procedure("int8") is Int8
