"""Norms, rotary and absolute positions, short convolutions, states, activations."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compare import assert_close
from manyheads.layers.absolute import sinusoidal
from manyheads.layers.activations import activation
from manyheads.layers.conv import ShortConv
from manyheads.layers.heads import merge_heads, repeat_kv, split_heads
from manyheads.layers.mlp import GatedMLP, swiglu_width
from manyheads.layers.norms import RMSNorm, simple_rms_norm
from manyheads.layers.rotary import apply_rotary, rotary_angles
from manyheads.layers.state import clone_state, map_state, reorder_state, state_bytes


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_the_formula_in_any_dtype(affine, weight, dtype) -> None:
    norm = RMSNorm(21, eps=1e-2, affine=affine)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    norm = norm.to(weight)
    x = torch.randn(3, 7, 21).to(dtype)
    x[1] = 0
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    if norm.weight is not None:
        wanted = wanted * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    assert_close(out.double(), wanted.detach(), {torch.bfloat16: 4e-3}.get(dtype, 1e-6))


def test_simple_rms_norm_survives_zero_rows() -> None:
    x = torch.randn(4, 20, dtype=torch.float64)
    x[1] = 0
    x.requires_grad_()
    y = simple_rms_norm(x)
    assert (y[1] == 0).all()
    assert_close(y[[0, 2, 3]].square().mean(-1), torch.ones(3).double(), 1e-6)
    y[[0, 2, 3]].sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_scores_depend_on_the_distance(interleaved) -> None:
    q, k = torch.randn(2, 1, 1, 1, 20, dtype=torch.float64)
    cos, sin = rotary_angles(torch.arange(30), 20)
    rotated = [
        apply_rotary(t.expand(1, 1, 30, 20), cos.double(), sin.double(), interleaved=interleaved)
        for t in (q, k)
    ]
    scores = (rotated[0] @ rotated[1].mT)[0, 0]
    for distance in (0, 3, 11):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-6)
    with pytest.raises(ValueError, match="odd"):
        rotary_angles(torch.arange(3), 5)


def test_sinusoidal_is_the_formula() -> None:
    table = sinusoidal(torch.arange(50), 21)
    assert table.shape == (50, 21)
    assert_close(table[7, 3], torch.tensor(7.0).mul(10000 ** (-3 / 10)).sin(), 1e-6)
    assert_close(table[7, 13], torch.tensor(7.0).mul(10000 ** (-3 / 10)).cos(), 1e-6)


def test_short_conv_in_blocks_and_with_holes() -> None:
    conv = ShortConv(6, 4, bias=True).double()
    x, mask = torch.randn(3, 40, 6).double(), torch.rand(3, 40) > 0.4
    y, state = conv(x)
    first, middle = conv(x[:, :2])
    second, last = conv(x[:, 2:], middle)
    assert_close(torch.cat((first, second), 1), y, 1e-12)
    assert torch.equal(state, last)
    padded, final = conv(x, mask=mask)
    for row in range(3):
        alone, own = conv(x[row : row + 1, mask[row]])
        assert_close(padded[row, mask[row]], alone[0], 1e-12)
        assert_close(final[row], own[0], 1e-12)


class Pair(NamedTuple):
    memory: Tensor
    more: tuple[Tensor, None]


def test_states_are_mapped_counted_and_reordered() -> None:
    state = Pair(torch.randn(3, 4), (torch.arange(3), None))
    moved = reorder_state(state, torch.tensor([2, 2]))
    assert isinstance(moved, Pair)
    assert moved.more[0].tolist() == [2, 2]
    assert moved.more[1] is None
    assert torch.equal(moved.memory, state.memory[[2, 2]])
    assert state_bytes(state) == 3 * 4 * 4 + 3 * 8
    copied = clone_state(state)
    copied.memory.zero_()
    assert not torch.equal(copied.memory, state.memory)
    assert map_state(torch.sum, state).memory.ndim == 0


def test_heads_and_widths() -> None:
    x = torch.randn(2, 5, 12)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)
    repeated = repeat_kv(torch.arange(2).view(1, 2, 1, 1), 6).flatten()
    assert repeated.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="5 query heads"):
        repeat_kv(torch.zeros(1, 2, 1, 1), 5)
    assert [swiglu_width(d) for d in (1024, 2048, 2560)] == [2816, 5632, 6912]
    mlp = GatedMLP(12, 20, activation_name="identity")
    assert_close(mlp(x), mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x)), 1e-6)
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        activation("gelo")
