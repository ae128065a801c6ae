"""Softmax attention beyond the contract: biases, caches, grouped heads, rows without keys."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention import (
    SoftmaxAttention,
    SoftmaxConfig,
    softmax,
    softmax_reference,
    softmax_step,
    softmax_update,
    softmax_weights,
)
from manyheads.layers.state import state_bytes


def draw(batch=3, heads=4, kv_heads=2, length=63, keys=None, dim=20):
    q = torch.randn(batch, heads, length, dim).double()
    k, v = (torch.randn(batch, kv_heads, keys or length, dim).double() for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_and_biases_together(causal, kind) -> None:
    q, k, v = draw()
    bias = torch.randn(1, 4, 63, 63).double()
    attn_mask = bias > -0.5 if kind == "bool" else bias
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[0, :9] = mask[1, 50:] = mask[2] = False
    arguments = {"attn_mask": attn_mask, "is_causal": causal, "mask": mask}
    out = softmax(q, k, v, **arguments)
    assert_close(out, softmax_reference(q, k, v, **arguments), 1e-10)
    assert (out[2] == 0).all()


def test_weights_sum_to_one_where_there_is_a_key() -> None:
    q, k, _ = draw()
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[0, :9] = False
    weights = softmax_weights(q, k, is_causal=True, mask=mask)
    sums = weights.sum(-1)
    assert_close(sums[1:], torch.ones_like(sums[1:]), 1e-12)
    assert (sums[0, :, :9] == 0).all()


def test_is_what_torch_computes() -> None:
    q, k, v = draw(kv_heads=4)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert torch.equal(softmax(q, k, v, is_causal=True, scale=0.3), expected)
    q, k, v = draw(length=5, keys=40)
    assert_close(softmax(q, k, v), softmax_reference(q, k, v), 1e-10)


def test_cache_grows_by_doubling_and_rows_may_differ() -> None:
    q, k, v = draw(length=700)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :13] = mask[1, 30:] = False
    _, state = softmax_update(None, q[:, :, :40], k[:, :, :40], v[:, :, :40], mask=mask)
    capacities, outputs = set(), []
    for t in range(40, 700):
        step, state = softmax_step(state, q[:, :, t], k[:, :, t], v[:, :, t])
        capacities.add(state.key.shape[2])
        outputs.append(step)
    assert len(capacities) <= 4
    assert state.length.tolist() == [687, 690, 700]
    real = torch.cat((mask, torch.ones(3, 660, dtype=torch.bool)), 1)
    whole = softmax_reference(q, k, v, is_causal=True, mask=real)
    assert_close(torch.stack(outputs, 2), whole[:, :, 40:], 1e-10)
    assert state_bytes(state) >= 3 * 2 * 700 * 40 * 8


def test_gradients_pass_through_a_cache() -> None:
    leaves = [t.requires_grad_() for t in draw(length=30)]
    q, k, v = leaves
    first, state = softmax_update(None, q[:, :, :11], k[:, :, :11], v[:, :, :11])
    second, _ = softmax_update(state, q[:, :, 11:], k[:, :, 11:], v[:, :, 11:])
    whole = softmax(q, k, v, is_causal=True)
    cotangent = torch.randn_like(whole)
    one = torch.autograd.grad((whole * cotangent).sum(), leaves)
    two = torch.autograd.grad((torch.cat((first, second), 2) * cotangent).sum(), leaves)
    for a, b in zip(one, two, strict=True):
        assert_close(b, a, 1e-10)


def test_loads_torch_and_llama_names() -> None:
    official = torch.nn.MultiheadAttention(60, 3, batch_first=True).double()
    ours = SoftmaxAttention(
        SoftmaxConfig(embed_dim=60, num_heads=3, bias=True, rotary_theta=None, is_causal=False)
    ).double()
    ours.load_official(official.state_dict())
    x = torch.randn(2, 40, 60).double()
    assert_close(ours(x), official(x, x, x, need_weights=False)[0], 1e-10)
    assert set(ours.to_official()) == set(official.state_dict())
    grouped = SoftmaxAttention(SoftmaxConfig(embed_dim=60, num_heads=3, num_kv_heads=1))
    assert set(grouped.to_official()) == {f"{n}_proj.weight" for n in "qkvo"}


def test_rotary_depends_on_distance_alone() -> None:
    layer = SoftmaxAttention(SoftmaxConfig(embed_dim=60, num_heads=3)).double()
    x = torch.randn(1, 1, 60).double().expand(1, 30, 60)
    y = layer(x)
    assert_close(y[:, 1:], y[:, :1].expand(1, 29, 60), 1e-9)


def test_errors_name_the_fix() -> None:
    q, k, v = draw()
    with pytest.raises(ValueError, match="one key for each query"):
        softmax(q[:, :, :5], k, v, is_causal=True)
    with pytest.raises(ValueError, match="not a multiple of 2"):
        softmax(q[:, :3], k, v)
    with pytest.raises(ValueError, match="unflatten"):
        softmax(q[0], k, v)
    with pytest.raises(ValueError, match="bool"):
        softmax(q, k, v, mask=torch.zeros(3, 63))
    with pytest.raises(ValueError, match="pass head_dim"):
        SoftmaxConfig(embed_dim=50, num_heads=3)
    with pytest.raises(ValueError, match="no streaming form"):
        SoftmaxAttention(SoftmaxConfig(embed_dim=60, num_heads=3, is_causal=False)).init_state(1)
