"""DiagAttention beyond the contract: blocks, padding keys, relu, states, memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close, relative_error
from manyheads.attention import (
    DiagAttention,
    DiagConfig,
    diag,
    diag_reference,
    diag_step,
    diag_update,
    diag_weights,
    softmax,
)
from manyheads.choose.memory import largest_tensor_numel, peak_memory
from manyheads.layers.state import state_bytes


def draw(batch=1, heads=3, kv_heads=3, length=63, dim=20, value=12):
    q = torch.randn(batch, heads, length, dim).double()
    k = torch.randn(batch, kv_heads, length, dim).double()
    return q, k, torch.randn(batch, kv_heads, length, value).double()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    block_size=st.sampled_from([1, 4, 7, 16, 64]),
    kind=st.sampled_from(["softmax", "relu"]),
    implementation=st.sampled_from(["blocked", "plain"]),
    is_causal=st.booleans(),
    pad_keys=st.booleans(),
    late=st.booleans(),
    masked=st.booleans(),
    groups=st.sampled_from([1, 2]),
)
def test_all_forms_agree(
    length, block_size, kind, implementation, is_causal, pad_keys, late, masked, groups
) -> None:
    """Outputs and gradients of every combination equal the definition's."""
    torch.manual_seed(length)
    leaves = [
        t.requires_grad_() for t in draw(batch=2, heads=2, kv_heads=2 // groups, length=length)
    ]
    options = {
        "is_causal": is_causal,
        "block_size": block_size,
        "kind": kind,
        "pad_keys": pad_keys,
        "mask_after_softmax": late,
        "mask": torch.rand(2, length) < 0.7 if masked else None,
    }
    out = diag(*leaves, implementation=implementation, **options)
    expected = diag_reference(*leaves, **options)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(out)
    for one, two in zip(
        torch.autograd.grad((out * cotangent).sum(), leaves),
        torch.autograd.grad((expected * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_split_of_padded_rows_equals_one_call(data) -> None:
    """Rows stand at different places of their blocks; blocks and steps in any order."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    length, size = data.draw(st.integers(2, 60)), data.draw(st.sampled_from([1, 5, 8, 64]))
    kind = data.draw(st.sampled_from(["softmax", "relu"]))
    leaves = [t.requires_grad_() for t in draw(batch=3, heads=4, kv_heads=2, length=length)]
    mask = torch.rand(3, length) < 0.7
    borders = [0, *sorted(data.draw(st.lists(st.integers(1, length - 1), max_size=5))), length]
    state, parts = None, []
    for a, b in pairwise(borders):
        block = [t[:, :, a:b] for t in leaves]
        if b - a == 1 and state is not None and bool(mask[:, a].all()):
            out, state = diag_step(state, *(t[:, :, 0] for t in block), block_size=size, kind=kind)
            parts.append(out[:, :, None])
        else:
            out, state = diag_update(state, *block, mask=mask[:, a:b], block_size=size, kind=kind)
            parts.append(out)
    whole, final = diag_update(None, *leaves, mask=mask, block_size=size, kind=kind)
    split = torch.cat(parts, 2)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)
    for one, two in zip(state, final, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    assert final.length.tolist() == mask.sum(1).tolist()
    cotangent = torch.randn_like(whole)
    for one, two in zip(
        torch.autograd.grad((split * cotangent).sum(), leaves),
        torch.autograd.grad((whole * cotangent).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    pad_keys=st.booleans(),
)
def test_packed_sequences_are_alone(lengths, pad_keys) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = draw(length=int(borders[-1]))
    options = {"block_size": 8, "pad_keys": pad_keys}
    packed = diag(q, k, v, cu_seqlens=borders, **options)
    for a, b in pairwise(borders.tolist()):
        alone = diag(*(t[:, :, a:b] for t in (q, k, v)), **options)
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_closed_form_gradients_are_numerically_right(is_causal, kind) -> None:
    leaves = [t.requires_grad_() for t in draw(heads=2, kv_heads=2, length=7, dim=3, value=2)]
    for late in (False, True):
        assert torch.autograd.gradcheck(
            lambda *t, late=late: diag(
                *t, is_causal=is_causal, kind=kind, block_size=4, pad_keys=True,
                mask_after_softmax=late,
            ),
            leaves,
        )  # fmt: skip


def test_a_whole_block_is_softmax_attention() -> None:
    q, k, v = draw(heads=4, kv_heads=2)
    for is_causal in (True, False):
        expected = softmax(q, k, v, is_causal=is_causal)
        assert_close(diag(q, k, v, is_causal=is_causal), expected, 1e-9)
        assert_close(diag(q, k, v, is_causal=is_causal, block_size=1000), expected, 1e-9)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("place", [0, 7, 8, 30, 62])
def test_a_token_changes_its_own_block_alone(is_causal, place) -> None:
    q, k, v = draw(batch=2)
    out = diag(q, k, v, is_causal=is_causal, block_size=8)
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, :, place] = torch.randn_like(t[:, :, place])
    other = diag(*changed, is_causal=is_causal, block_size=8)
    start = place if is_causal else place // 8 * 8
    inside = torch.zeros(63, dtype=torch.bool)
    inside[start : place // 8 * 8 + 8] = True
    differs = (other != out).any(-1).any(1).any(0)
    assert torch.equal(differs, inside)


def test_padded_keys_are_zero_keys_of_the_last_block() -> None:
    """The published code pads with zeros and lets the softmax count them."""
    q, k, v = draw(length=13)
    zeros = [torch.cat((t, torch.zeros_like(t[:, :, :3])), 2) for t in (q, k, v)]
    counted = diag(*zeros, block_size=8)[:, :, :13]
    assert_close(diag(q, k, v, block_size=8, pad_keys=True), counted, 1e-9)
    plain = diag(q, k, v, block_size=8)
    assert torch.equal(plain[:, :, :8], diag(q, k, v, block_size=8, pad_keys=True)[:, :, :8])
    assert relative_error(plain[:, :, 8:], counted[:, :, 8:]) > 0.1
    mask = torch.ones(1, 13, dtype=torch.bool)
    mask[:, 3:5] = False  # padding inside: blocks are counted among real tokens
    alone = diag(*(t[:, :, mask[0]] for t in (q, k, v)), block_size=8, pad_keys=True)
    out = diag(q, k, v, block_size=8, pad_keys=True, mask=mask)
    assert_close(out[:, :, mask[0]], alone, 1e-9)
    for kind, is_causal in (("relu", False), ("softmax", True)):
        options = {"kind": kind, "is_causal": is_causal, "block_size": 8}
        assert torch.equal(diag(q, k, v, **options), diag(q, k, v, pad_keys=True, **options))


def test_masking_after_the_softmax_leaks_through_the_denominator() -> None:
    q, k, v = draw()
    options = {"is_causal": True, "block_size": 16, "mask_after_softmax": True}
    out = diag(q, k, v, **options)
    later = k.clone()
    later[:, :, 10] += 1
    other = diag(q, later, v, **options)
    assert relative_error(other[:, :, 5], out[:, :, 5]) > 1e-3
    weights = diag_weights(q, k, **options)
    assert (weights.triu(1) == 0).all()
    assert (weights[:, :, :-1].sum(-1) < 1).any()


def test_weights_are_the_attention_and_stay_in_blocks() -> None:
    q, k, v = draw(batch=2)
    mask = torch.rand(2, 63) < 0.8
    weights = diag_weights(q, k, mask=mask, block_size=16)
    assert_close(weights @ v, diag(q, k, v, mask=mask, block_size=16), 1e-9)
    rows = weights.sum(-1)[mask[:, None].expand(-1, 3, -1)]
    torch.testing.assert_close(rows, torch.ones_like(rows))


@pytest.mark.parametrize("kind", ["softmax", "relu"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_without_a_real_token_are_zero_and_padding_may_be_anything(kind, is_causal) -> None:
    leaves = [t.float() for t in draw(batch=3)]
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[1] = False
    mask[2, 50:] = False
    for t in leaves:
        t[~mask[:, None].expand(-1, 3, -1)] = torch.nan
    leaves = [t.requires_grad_() for t in leaves]
    out = diag(*leaves, kind=kind, is_causal=is_causal, mask=mask, block_size=16)
    assert (out[1] == 0).all()
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad(out.square().sum(), leaves):
        assert torch.isfinite(grad).all()
        assert (grad[1] == 0).all()


def test_all_negative_scores_under_relu_give_zero_and_a_finite_gradient() -> None:
    """The pitfall of T1: the norm meets a row of zeros, in both precisions."""
    for dtype in (torch.float32, torch.float16):
        layer = DiagAttention(
            DiagConfig(embed_dim=16, num_heads=2, variant="t1", lrpe=False, block_size=8)
        )
        with torch.no_grad():
            for p in (layer.q_proj, layer.k_proj):
                p.weight.zero_()
            layer.q_proj.bias.fill_(1)
            layer.k_proj.bias.fill_(-1)
        layer = layer.to(dtype)
        x = torch.randn(2, 20, 16, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert torch.equal(y, layer.out_proj.bias.expand_as(y))
        y.sum().backward()
        for grad in (x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)):
            assert torch.isfinite(grad).all()


def test_dropout_acts_on_the_weights() -> None:
    q, k, _ = draw(length=64)
    v = torch.eye(64).double().expand(1, 3, 64, 64)
    out = diag(q, k, v, dropout_p=0.25)
    kept = out != 0
    assert 0.72 < kept.double().mean() < 0.78
    assert_close(out[kept], diag(q, k, v)[kept] / 0.75, 1e-9)
    with pytest.raises(ValueError, match="plain"):
        diag(q, k, v, dropout_p=0.25, implementation="blocked")
    layer = DiagAttention(DiagConfig(embed_dim=60, num_heads=3, attention_dropout=0.5))
    x = torch.randn(1, 63, 60)
    assert relative_error(layer.train()(x), layer.eval()(x)) > 0.1
    assert torch.equal(layer(x), layer(x))


def test_state_is_one_block_whatever_the_context() -> None:
    layer = DiagAttention(DiagConfig(embed_dim=16, num_heads=2, block_size=8))
    state, sizes = layer.init_state(1), set()
    with torch.no_grad():
        for t in range(20):
            _, state = layer.step(torch.randn(1, 16), state)
            sizes.add(state_bytes(state))
            held = (state.key != 0).any(-1).any(1).sum(-1)
            assert held.tolist() == [(t + 1) % 8], "empty again at each border"
    assert len(sizes) == 1


def test_step_does_not_change_its_state_and_knows_its_block_size() -> None:
    q, k, v = draw()
    _, state = diag_update(None, q, k, v, block_size=16)
    before = state.key.clone()
    token = [t[:, :, 0] for t in (q, k, v)]
    diag_step(state, *token, block_size=16)
    assert torch.equal(state.key, before)
    for call in (
        lambda: diag_step(state, *token),
        lambda: diag_update(state, q, k, v, block_size=8),
    ):
        with pytest.raises(ValueError, match="blocks of 16"):
            call()


@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_memory_is_linear_and_nothing_is_quadratic(kind) -> None:
    peaks = []
    for length in (1024, 2048):
        leaves = [torch.randn(1, 8, length, 32, requires_grad=True) for _ in range(3)]

        def run(leaves=leaves):
            diag(*leaves, kind=kind, is_causal=True).square().sum().backward()

        assert largest_tensor_numel(run) < 2 * leaves[0].numel() + (1 << 18)
        peaks.append(peak_memory(run).peak_bytes)
    assert peaks[1] < 2.2 * peaks[0]


def test_function_compiles_with_a_mask() -> None:
    q, k, v = (t.float().requires_grad_() for t in draw(batch=2))
    mask = torch.rand(2, 63) < 0.7

    def run(q, k, v, mask):
        return diag(q, k, v, mask=mask, block_size=16, pad_keys=True)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, mask)
    expected = run(q, k, v, mask)
    assert_close(out, expected, 1e-6)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        assert_close(a, b, 1e-5)


OPTIONS = [
    {"variant": "t1"},
    {"variant": "t2"},
    {"lrpe": False},
    {"learned_angles": False, "householder": False},
    {"block_size": 1},
    {"block_size": 64},
    {"variant": "t1", "norm": "layer", "layout": "lra"},
    {"variant": "t1", "norm": "batch", "layout": "lra"},
    {"variant": "t2", "norm": "batch", "layout": "lra"},
    {"num_heads": 8},  # five channels a head: the last is not turned
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_layer(options) -> None:
    options = {"num_heads": 4, "block_size": 8} | options
    layer = DiagAttention(DiagConfig(embed_dim=40, **options)).double()
    x, mask = torch.randn(2, 50, 40).double(), torch.ones(2, 50, dtype=torch.bool)
    if options.get("norm") == "batch":
        layer(x)  # running statistics that are not those of the start
    layer.eval()
    mask[0, :11] = False
    mask[1, 4:6] = False
    y = layer(x, mask=mask)
    first, state = layer.update(x[:, :20], layer.init_state(2), mask=mask[:, :20])
    second, state = layer.update(x[:, 20:49], state)
    last, state = layer.step(x[:, 49], state)
    assert state.length.tolist() == [39, 48]
    assert_close(torch.cat((first, second, last[:, None]), 1)[mask], y[mask], 1e-9)
    packed = torch.cat((x[0, mask[0]], x[1, mask[1]]))[None]
    both = layer(packed, cu_seqlens=torch.tensor([0, 39, 87]))
    assert_close(both[0], y[mask], 1e-9)
    other = DiagAttention(DiagConfig(embed_dim=40, **options)).double().eval()
    assert_close(other.load_official(layer.to_official())(x), layer(x), 1e-12)


def test_positions_start_again_in_each_block() -> None:
    layer = DiagAttention(DiagConfig(embed_dim=40, num_heads=4, block_size=8))
    x = torch.randn(1, 8, 40)
    y = layer(torch.cat((x, x), 1))
    assert_close(y[:, 8:], y[:, :8], 1e-6)


def test_errors_name_the_fix() -> None:
    q, k, v = draw()
    with pytest.raises(ValueError, match="softmax"):
        diag(q, k, v, kind="softmaxx")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size 0"):
        diag(q, k, v, block_size=0)
    with pytest.raises(ValueError, match="blocked"):
        diag(q, k, v, implementation="block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        diag(q, k, v, mask=torch.ones(1, 63).bool(), cu_seqlens=torch.tensor([0, 63]))
    with pytest.raises(ValueError, match="block_size 0"):
        DiagConfig(embed_dim=40, block_size=0)
    with pytest.raises(ValueError, match="attention_dropout"):
        DiagConfig(embed_dim=40, attention_dropout=1.0)
    for options, reason in (
        ({"is_causal": False}, "no streaming form"),
        ({"mask_after_softmax": True}, "sees the future"),
    ):
        layer = DiagAttention(DiagConfig(embed_dim=40, **options))
        with pytest.raises(ValueError, match=reason):
            layer.init_state(1)
