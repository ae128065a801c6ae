"""Outlook attention: the definition, gradients, odd grids, precision, its costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention.grid import GridShape, build_mixer, get_mixer
from manyheads.attention.grid.outlook import OutlookAttention, outlook, outlook_reference
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import peak_memory
from manyheads.papers.volo import unfolded

# rows, columns, kernel, stride
GRIDS = [(9, 6, 3, 2), (4, 7, 5, 1), (5, 5, 3, 3), (1, 2, 3, 2), (7, 3, 3, 4), (6, 6, 1, 1)]


def _inputs(rows: int, columns: int, kernel: int, stride: int) -> tuple[torch.Tensor, ...]:
    value = torch.randn(3, rows, columns, 10, dtype=torch.float64)
    anchors = -(-rows // stride), -(-columns // stride)
    logits = torch.randn(3, *anchors, 2, kernel**2, kernel**2, dtype=torch.float64) * 3
    return value.requires_grad_(), logits.requires_grad_()


@pytest.mark.parametrize("grid", GRIDS)
def test_the_fast_form_is_the_definition(grid) -> None:
    value, logits = _inputs(*grid)
    results = []
    for fn in (outlook, outlook_reference):
        out = fn(value, logits.softmax(-1), stride=grid[3])
        cotangent = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, (value, logits), cotangent)))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-12)


def test_second_derivatives() -> None:
    value, logits = _inputs(3, 2, 3, 2)
    assert torch.autograd.gradgradcheck(
        lambda v, a: outlook(v, a.softmax(-1), stride=2),
        (value[:1, ..., :2].detach().requires_grad_(), logits[:1].detach().requires_grad_()),
    )


@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 1), (2, 2, 0), (5, 1, 2)])
def test_it_is_unfold_and_fold(kernel, stride, pad) -> None:
    """Also with an even window, where rows and columns divide by the stride."""
    value, weights = (
        torch.randn(2, 6, 8, 6),
        torch.randn(2, 6 // stride, 8 // stride, 2, kernel**2, kernel**2),
    )
    columns = F.unfold(value.permute(0, 3, 1, 2), kernel, padding=pad, stride=stride)
    columns = columns.view(2, 2, 3, kernel**2, -1).permute(0, 4, 1, 3, 2)
    mixed = weights.flatten(1, 2) @ columns
    mixed = mixed.permute(0, 2, 4, 3, 1).reshape(2, 6 * kernel**2, -1)
    folded = F.fold(mixed, (6, 8), kernel, padding=pad, stride=stride).permute(0, 2, 3, 1)
    assert_close(outlook(value, weights, stride=stride, padding=pad), folded, 1e-6)


def test_what_does_not_fit_is_named() -> None:
    value, weights = torch.randn(1, 9, 6, 12), torch.randn(1, 5, 3, 3, 9, 9)
    with pytest.raises(ValueError, match="9 rows have 5 anchors"):
        outlook(value, weights[:, :4], stride=2)
    with pytest.raises(ValueError, match="6 columns have 3 anchors"):
        outlook(value, weights[:, :, :2], stride=2)
    with pytest.raises(ValueError, match="7 windows of 3 at padding 3"):
        outlook(value, weights, stride=2, padding=3)
    with pytest.raises(ValueError, match="12 channels"):
        outlook(value, torch.randn(1, 5, 3, 5, 9, 9), stride=2)
    with pytest.raises(ValueError, match="square"):
        outlook(value, weights[..., :8, :8], stride=2)
    with pytest.raises(ValueError, match="axes"):
        outlook(value[0], weights, stride=2)
    with pytest.raises(ValueError, match="batch of 1"):
        outlook(value, weights.expand(2, -1, -1, -1, -1, -1), stride=2)
    with pytest.raises(ValueError, match="num_heads 5"):
        OutlookAttention(12, num_heads=5)
    with pytest.raises(ValueError, match="'strid'"):
        build_mixer("outlook", 12, num_heads=3, strid=1)


def test_the_last_cell_is_a_mean_of_what_is_there() -> None:
    layer = OutlookAttention(6, num_heads=2, stride=2)
    x = torch.randn(1, 5, 3, 6)
    corner = layer.attn(x[0, 4, 2]).view(2, 9, 9) * 3**-0.5
    assert_close(layer.weights(x)[0, 2, 1], corner.softmax(-1), 1e-6)


def test_folding_the_scale_changes_nothing() -> None:
    layer = OutlookAttention(6, num_heads=2, stride=2, scale=0.3)
    x = torch.randn(1, 5, 3, 6)
    before = layer(x)
    layer.fold()
    assert_close(layer(x), before, 1e-6)


def test_half_precision_has_a_float32_softmax() -> None:
    layer = OutlookAttention(32, num_heads=2, stride=2).double()
    nn.init.normal_(layer.attn.weight, std=4)
    x = torch.randn(2, 7, 6, 32, dtype=torch.float64)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = layer.float()(x.float())
    exact = layer.double()(x)
    for out in (half, mixed):
        assert (out.double() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("size", [(28, 28), (9, 6)])
def test_cost(size) -> None:
    shape = GridShape(batch=2, dim=48, height=size[0], width=size[1], num_heads=3)
    mixer = build_mixer("outlook", 48, num_heads=3)
    x = torch.randn(2, 48, *size)
    assert count_flops(lambda: mixer(x)).total == get_mixer("outlook").flops(shape)


def test_cost_is_linear_in_places() -> None:
    flops = [get_mixer("outlook").flops(GridShape(height=n, width=n)) for n in (28, 56)]
    assert flops[1] == 4 * flops[0]
    flops = [get_mixer("attention").flops(GridShape(height=n, width=n)) for n in (56, 112)]
    assert flops[1] > 10 * flops[0]


def test_no_columns_are_made() -> None:
    """Gathered windows and the mixed ones, 9/4 of the map each; unfolding holds twice that."""
    value, weights = torch.randn(1, 40, 40, 64), torch.rand(1, 20, 20, 1, 9, 9)
    with torch.no_grad():
        peak = peak_memory(lambda: outlook(value, weights, stride=2)).peak_bytes
        usual = peak_memory(lambda: unfolded(value, weights)).peak_bytes
    assert peak < 6 * 4 * value.numel()
    assert usual > 1.3 * peak
