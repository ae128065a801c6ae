"""Packed linear layers: equal to plain ones whatever comes in, and never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compare import assert_close
from manyheads.choose.flops import count_flops
from manyheads.layers.mlp import MLP
from manyheads.layers.packed import PackedConv2d, PackedLinear, can_pack, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
def test_equal_to_a_plain_layer(bias, gelu) -> None:
    linear = nn.Linear(20, 13, bias=bias)
    packed = PackedLinear(linear, gelu=gelu)
    inputs = [torch.randn(7, 20), torch.randn(1, 20), torch.randn(2, 3, 5, 20), torch.randn(20),
              torch.randn(20, 63).mT, torch.randn(3, 20, 4).mT, torch.randn(2, 1, 20)]  # fmt: skip
    with torch.no_grad():
        for x in inputs:
            expected = F.gelu(linear(4 * x)) if gelu else linear(4 * x)
            assert_close(packed(4 * x), expected, 1e-6)
        assert packed(torch.randn(0, 20)).shape == (0, 13)
    assert (packed._packed is not None) == can_pack()


def test_a_changed_weight_is_packed_anew() -> None:
    packed = PackedLinear(nn.Linear(20, 13))
    x = torch.randn(7, 20)
    with torch.no_grad():
        before = packed(x)
        packed.weight.mul_(2)
        assert_close(packed(x) - packed.bias, 2 * (before - packed.bias), 1e-6)
        packed.weight = nn.Parameter(torch.ones(13, 20))
        assert_close(packed(x), x.sum(1, keepdim=True) + packed.bias, 1e-6)


def test_training_and_other_precisions_run_plainly() -> None:
    linear = nn.Linear(20, 13)
    packed = PackedLinear(linear)
    packed(torch.randn(7, 20)).sum().backward()
    assert packed.weight.grad is not None
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(torch.randn(7, 20)).dtype == torch.bfloat16
        assert packed.double()(torch.randn(7, 20).double()).dtype == torch.float64
    with torch.inference_mode():
        inside = PackedLinear(nn.Linear(20, 13))
        assert inside(torch.randn(7, 20)).shape == (7, 13)


def test_copies_and_files_hold_the_weight_alone() -> None:
    packed = PackedLinear(nn.Linear(20, 13))
    x = torch.randn(7, 20)
    with torch.no_grad():
        expected = packed(x)
        for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert again._packed is None
            assert torch.equal(again(x), expected)
            assert again.weight is not packed.weight
    assert set(packed.state_dict()) == {"weight", "bias"}


def test_a_whole_module() -> None:
    class Head(nn.Linear):
        pass

    module = nn.Sequential(MLP(8, 24), Head(8, 4), MLP(4, 5, activation_name="silu"))
    names = set(module.state_dict())
    x = torch.randn(3, 8)
    expected = module(x)
    pack_linears(module)
    assert set(module.state_dict()) == names
    assert type(module[1]) is Head
    assert module[0].fc1.gelu
    assert not module[2].fc1.gelu
    with torch.no_grad():
        assert_close(module(x), expected, 1e-6)
        assert count_flops(lambda: module(x)).total == 2 * 3 * (2 * 8 * 24 + 8 * 4 + 2 * 4 * 5)
    assert_close(module(x), expected, 1e-6)


def test_graphs_are_traced_without_it() -> None:
    packed = PackedLinear(nn.Linear(20, 13), gelu=True)
    x = torch.randn(7, 20)
    with torch.no_grad():
        expected = packed(x)
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), expected, 1e-6)
        exported = torch.export.export(packed, (x,)).module()
    assert_close(exported(x), expected, 1e-6)


@pytest.mark.parametrize("gelu", [True, False])
def test_a_residual_joins_in_the_same_pass(gelu) -> None:
    linear = nn.Linear(20, 13)
    packed = PackedLinear(linear, gelu=gelu)
    x, residual = torch.randn(2, 3, 5, 20), torch.randn(2, 13, 3, 5)
    residual = residual.permute(0, 2, 3, 1)
    expected = residual + (F.gelu(linear(x)) if gelu else linear(x))
    assert_close(packed(x, residual), expected, 1e-6)
    before = residual.clone()
    with torch.no_grad():
        assert_close(packed(x, residual), expected, 1e-6)
        assert_close(packed(x[0, 0], residual[0, 0]), expected[0, 0], 1e-6)
        wide = packed(x, residual.double())
        assert count_flops(lambda: packed(x, residual)).total == 2 * 30 * 20 * 13
    assert wide.dtype == torch.float64
    assert_close(wide, expected.double(), 1e-6)
    assert torch.equal(residual, before)


def test_a_convolution_of_one_place_keeps_its_shape() -> None:
    conv = nn.Conv2d(20, 13, 1)
    packed, x = PackedLinear(conv), torch.randn(2, 20, 5, 3)
    with torch.no_grad():
        found = packed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_close(found, conv(x), 1e-6)
    assert packed.weight is conv.weight
    for name, changes in (("kernel_size", {"kernel_size": 3}), ("stride", {"stride": 2}),
                          ("padding", {"padding": 1}), ("groups", {"groups": 2})):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} .* is no linear layer"):
            PackedLinear(nn.Conv2d(4, 4, **({"kernel_size": 1} | changes)))


@pytest.mark.parametrize("bias", [True, False])
def test_halves_of_the_outputs(bias) -> None:
    linear = nn.Linear(20, 26, bias=bias)
    packed, x, factor = PackedLinear(linear), torch.randn(2, 5, 3, 20), torch.randn(2, 5, 3, 13)
    first, second = linear(x).chunk(2, -1)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            for _ in range(2):
                assert_close(packed.cut(x, 0), first, 1e-6)
                assert_close(packed.cut(x, 1, factor), factor * second, 1e-6)
    with torch.no_grad():
        assert_close(packed(x), linear(x), 1e-6)
        packed.weight.mul_(2)
        assert_close(packed.cut(x, 1), linear(x).chunk(2, -1)[1], 1e-6)


CONVOLUTIONS = [
    nn.Conv2d(12, 12, 3, padding=1, groups=12),
    nn.Conv2d(3, 20, 7, 4, 2, bias=False),
    nn.Conv2d(12, 8, (3, 1), (2, 1), (0, 1), dilation=2, groups=4),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("gelu", [True, False])
def test_convolutions(conv, gelu) -> None:
    packed = PackedConv2d(conv, gelu=gelu)
    for batch, height, width in ((2, 19, 23), (1, 40, 31)):
        x = torch.randn(batch, conv.in_channels, height, width)
        expected = F.gelu(conv(x)) if gelu else conv(x)
        for other in (x, x.contiguous(memory_format=torch.channels_last)):
            assert_close(packed(other), expected, 1e-6)
            with torch.no_grad():
                assert_close(packed(other), expected, 1e-6)
    assert (packed._packed is not None) == can_pack()
    with torch.no_grad():
        empty = torch.randn(0, conv.in_channels, 19, 9)
        assert packed(empty).shape == conv(empty).shape
        exported = torch.export.export(packed, (x := torch.randn(2, conv.in_channels, 9, 11),))
        assert_close(exported.module()(x), packed(x), 1e-6)
    assert copy.deepcopy(packed)._packed is None


def test_convolutions_that_are_not_packed() -> None:
    for changes in ({"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        with pytest.raises(ValueError, match="give numbers and 'zeros'"):
            PackedConv2d(nn.Conv2d(4, 4, 3, **changes))
