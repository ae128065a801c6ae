"""Gated linear attention beyond the contract: forms, gates, states, memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention import (
    GatedLinearAttention,
    GLAConfig,
    gla,
    gla_reference,
    gla_step,
    gla_update,
    gla_weights,
)
from manyheads.attention.gla import GLAState
from manyheads.choose.memory import peak_memory


def draw(batch=1, heads=2, kv_heads=2, length=63, dim=20, value=12, strength=1.0):
    q = torch.randn(batch, heads, length, dim).double()
    k, g = (torch.randn(batch, kv_heads, length, dim).double() for _ in range(2))
    v = torch.randn(batch, kv_heads, length, value).double()
    return q, k, v, F.logsigmoid(g) * strength


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    chunk_size=st.sampled_from([1, 7, 16, 32, 64, 100]),
    strength=st.sampled_from([0.0, 1 / 16, 1.0, 60.0]),
    implementation=st.sampled_from(["chunked", "recurrent", "parallel"]),
    groups=st.sampled_from([1, 2]),
)
def test_all_forms_agree(length, chunk_size, strength, implementation, groups) -> None:
    torch.manual_seed(length)
    q, k, v, g = draw(heads=2, kv_heads=2 // groups, length=length, strength=strength)
    out = gla(q, k, v, g, chunk_size=chunk_size, implementation=implementation)
    assert_close(out, gla_reference(q, k, v, g), 1e-9)


@pytest.mark.parametrize("strength", [1 / 16, 1.0, 60.0])
def test_gradients_flow_through_the_state(strength) -> None:
    """Two blocks joined by their state have the gradients of one call."""
    leaves = [t.requires_grad_() for t in draw(batch=3, length=130, strength=strength)]
    memory = torch.randn(3, 2, 20, 12).double().requires_grad_()
    cotangent, final = torch.randn(3, 2, 130, 12).double(), torch.randn(3, 2, 20, 12).double()
    results = []
    for borders in ((0, 130), (0, 37, 130)):
        state, parts = GLAState(memory), []
        for a, b in pairwise(borders):
            block = [t[:, :, a:b] for t in leaves]
            out, state = gla_update(state, *block, implementation="chunked")
            parts.append(out)
        total = (torch.cat(parts, 2) * cotangent).sum() + (state.memory * final).sum()
        results.append(torch.autograd.grad(total, [*leaves, memory]))
    for name, one, two in zip("qkvgS", *results, strict=True):
        assert_close(two, one, 1e-9, name)


def test_closed_form_gradients_are_numerically_right() -> None:
    leaves = [
        t[:, :1].requires_grad_() for t in draw(heads=1, kv_heads=1, length=9, dim=3, value=2)
    ]
    assert torch.autograd.gradcheck(
        lambda *t: gla(*t, chunk_size=4, implementation="chunked"), leaves
    )


def test_weights_are_the_implied_attention() -> None:
    q, k, v, g = draw()
    weights = gla_weights(q, k, g)
    assert_close(weights @ v, gla(q, k, v, g), 1e-10)
    assert (weights.triu(1) == 0).all()


def test_no_decay_is_plain_linear_attention() -> None:
    q, k, v, g = draw()
    expected = (q @ k.mT).tril() @ v * 20**-0.5
    assert_close(gla(q, k, v, torch.zeros_like(g)), expected, 1e-10)


def test_strong_decay_in_float32_stays_within_the_published_error() -> None:
    q, k, v, g = draw(length=200, strength=40.0)
    out = gla(*(t.float() for t in (q, k, v, g)), implementation="chunked")
    assert_close(out, gla_reference(q, k, v, g), 1e-5)


def test_a_huge_decay_forgets_and_nothing_else() -> None:
    """Log decays of -1e4 erase the past; only the token itself is left."""
    q, k, v, g = (t.float() for t in draw())
    out = gla(q, k, v, torch.full_like(g, -1e4))
    assert_close(out, (q * k).sum(-1, keepdim=True) * v * 20**-0.5, 1e-5)


def test_memory_is_linear_and_small() -> None:
    """No (N, D, V) states, no N x N scores, and temporaries of one segment at a time."""
    peaks = []
    for length in (2048, 4096):
        inputs = draw(heads=8, kv_heads=8, length=length, dim=64, value=64, strength=1 / 16)
        leaves = [t.float().requires_grad_() for t in inputs]
        run = peak_memory(lambda leaves=leaves: gla(*leaves).sum().backward())
        peaks.append(run.peak_bytes / (leaves[0].numel() * 4))
        assert run.largest_tensor_bytes <= leaves[0].numel() * 4
    # Output, its gradient, four gradients, one memory a chunk, and a segment's temporaries.
    assert peaks[0] < 14
    assert peaks[1] < 10


def test_step_does_not_change_its_state() -> None:
    q, k, v, g = draw()
    _, state = gla_update(None, q, k, v, g)
    before = state.memory.clone()
    gla_step(state, *(t[:, :, 0] for t in (q, k, v, g)))
    assert torch.equal(state.memory, before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "clamp_min": -0.05},
        {"conv_size": 4, "conv_bias": True},
        {"output_gate": False},
        {"feature_map": "relu", "expand_v": 2.0, "expand_k": 1.0},
        {"norm_affine": False, "fuse_norm": False, "gate_fn": "sigmoid"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_the_layer(options) -> None:
    layer = GatedLinearAttention(GLAConfig(embed_dim=40, num_heads=4, **options)).double()
    x, mask = torch.randn(2, 50, 40).double(), torch.ones(2, 50, dtype=torch.bool)
    mask[0, :11] = False
    mask[1, 4:6] = False
    y = layer(x, mask=mask)
    first, state = layer.update(x[:, :20], layer.init_state(2), mask=mask[:, :20])
    second, state = layer.update(x[:, 20:49], state)
    last, _ = layer.step(x[:, 49], state)
    assert_close(torch.cat((first, second, last[:, None]), 1)[mask], y[mask], 1e-9)
    assert_close(layer(x[:1, mask[0]]), y[:1, mask[0]], 1e-9)
    packed = torch.cat((x[0, mask[0]], x[1, mask[1]]))[None]
    both = layer(packed, cu_seqlens=torch.tensor([0, 39, 87]))
    assert_close(both[0], y[mask], 1e-9)


def test_errors_name_the_fix() -> None:
    q, k, v, g = draw()
    with pytest.raises(ValueError, match="one natural-log gate"):
        gla(q, k, v, g[..., :1])
    with pytest.raises(ValueError, match="chunked"):
        gla(q, k, v, g, implementation="chunks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size 0"):
        gla(q, k, v, g, chunk_size=0)
    with pytest.raises(ValueError, match="not both"):
        gla(q, k, v, g, mask=torch.ones(1, 63).bool(), cu_seqlens=torch.tensor([0, 63]))
    with pytest.raises(ValueError, match="no bidirectional form"):
        GLAConfig(embed_dim=40, is_causal=False)
    with pytest.raises(ValueError, match="num_heads 3"):
        GLAConfig(embed_dim=40, num_heads=3)
