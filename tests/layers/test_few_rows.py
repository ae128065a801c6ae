from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from manyheads.layers import few_rows
from manyheads.layers.few_rows import Linear, quicken
from manyheads.native import disabled, library
from native import calls_rows


def close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    exact = F.linear(x.double(), weight.double(), bias.double())
    # What rounding can do to a sum grows with the sum of its terms' sizes.
    bound = 1e-6 * (F.linear(x.double().abs(), weight.double().abs()) + bias.abs() + 1e-6)
    return bool(((found.double() - exact).abs() <= bound).all())


@settings(deadline=None)
@given(rows=st.integers(0, 20), inputs=st.integers(0, 200), outputs=st.integers(0, 70))
def test_the_kernel_is_a_linear_layer(rows, inputs, outputs):
    x, weight, bias = calls_rows.inputs((rows, inputs, outputs))
    assert close(calls_rows.run(x, weight, bias), x, weight, bias)
    zero = torch.zeros_like(bias)
    assert close(calls_rows.run(x, weight, None), x, weight, zero)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_numbers(threads):
    before = torch.get_num_threads()
    x, weight, bias = calls_rows.inputs((5, 77, 41))
    wanted = calls_rows.run(x, weight, bias)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(calls_rows.run(x, weight, bias), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def used(monkeypatch):
    """Count calls of the kernel."""
    counted = []
    real = few_rows._kernel

    def kernel():
        found = real()

        def call(*arguments):
            counted.append(arguments[4:7])
            found(*arguments)

        return call

    monkeypatch.setattr(few_rows, "_kernel", kernel)
    return counted


def test_a_few_rows_use_the_kernel_and_more_do_not(used):
    torch.manual_seed(0)
    layer = Linear(256, 300)
    with torch.no_grad():
        for shape in ((256,), (1, 256), (2, 3, 256), (8, 256)):
            x = torch.randn(shape)
            assert close(layer(x), x, layer.weight, layer.bias)
        assert used == [(1, 256, 300), (1, 256, 300), (6, 256, 300), (8, 256, 300)]
        x = torch.randn(9, 256)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(x[:0]).shape == (0, 300)
    assert len(used) == 4 + 1  # of no rows the kernel has nothing to do


@pytest.mark.parametrize("case", ["grad", "half", "autocast", "meta", "watched", "vmap", "small"])
def test_everything_else_runs_as_nn_linear(case, used):
    torch.manual_seed(0)
    layer = Linear(256, 300)
    x = torch.randn(2, 256)
    with torch.no_grad():
        if case == "half":
            found = layer.double()(x.double())
            assert found.dtype == torch.float64
        elif case == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
        elif case == "meta":
            assert layer.to("meta")(x.to("meta")).shape == (2, 300)
        elif case == "watched":
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                layer(x)
            assert counter.get_total_flops() == 2 * 2 * 256 * 300
        elif case == "vmap":
            found = torch.vmap(layer)(x)
            torch.testing.assert_close(found, layer(x))
            used.clear()
        elif case == "small":
            Linear(8, 8)(x[:, :8])
    if case == "grad":
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(300, -1))
    assert used == []


def test_graphs_are_those_of_nn_linear():
    torch.manual_seed(0)
    layer, x = Linear(256, 300).eval(), torch.randn(1, 256)
    with torch.no_grad():
        graph = torch.export.export(layer, (x,))
        assert any("linear" in str(n.target) for n in graph.graph.nodes)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for made in (graph.module(), compiled, torch.jit.trace(layer, x)):
            assert torch.equal(made(x), F.linear(x, layer.weight, layer.bias))


def test_odd_layouts_and_wrong_widths():
    torch.manual_seed(0)
    layer = Linear(256, 300)
    wide = torch.randn(3, 512)
    with torch.no_grad():
        torch.testing.assert_close(layer(wide[:, ::2]), layer(wide[:, ::2].contiguous()))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(2, 255))
        with disabled():
            assert torch.equal(layer(wide[:, :256]), F.linear(wide[:, :256], *layer.parameters()))


def test_quicken_changes_nothing_but_the_pace():
    torch.manual_seed(0)

    class Own(nn.Linear):
        pass

    model = nn.Sequential(
        nn.Linear(256, 300), nn.Sequential(nn.GELU(), nn.Linear(300, 256)), Own(4, 4)
    )
    wanted, state = copy.deepcopy(model), model.state_dict()
    assert quicken(model) == 2
    assert type(model[2]) is Own
    assert quicken(model) == 0
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 256)
    with torch.no_grad():
        torch.testing.assert_close(model[:2](x), wanted[:2](x))
    again = copy.deepcopy(model)
    assert type(again[0]) is Linear
    assert again[0].weight is not model[0].weight


def test_there_is_a_compiler_here():
    assert library("rows") is not None
