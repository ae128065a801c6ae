"""Scores, selection, what is held, and the mask simulation, without any model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from manyheads.choose.memory import largest_tensor_numel, peak_memory
from manyheads.compress.a2sf import (
    A2SF,
    H2O,
    EvictionState,
    SinkRecent,
    SnapKV,
    StreamingLLM,
    column_sums,
    forgetting_weights,
    simulate_eviction,
)


def qkv(length: int, *, batch: int = 2, heads: int = 4, groups: int = 2, dim: int = 20):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads, length, dim, generator=generator) * 2
    k, v = (torch.randn(batch, groups, length, dim, generator=generator) for _ in range(2))
    return q, k, v


def dense(q, k, mask=None):
    share = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(share, 1).transpose(2, 3) * q.shape[-1] ** -0.5
    n, m = scores.shape[-2:]
    allowed = torch.ones(n, m, dtype=torch.bool).tril(m - n) if mask is None else mask
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


def run(state: EvictionState, q, k, v, *, mask=None, prompt=None):
    """Read a prompt at once and the rest token by token; return the outputs."""
    length = q.shape[2]
    cuts = [0, prompt or length, *range((prompt or length) + 1, length + 1)]
    outputs = []
    for a, b in pairwise(cuts):
        keys, values = state.append(k[:, :, a:b], v[:, :, a:b])
        given = None if mask is None else mask[:, :, a:b, a:b]
        seen = state.mask(given, q[:, :, a:b])
        if seen is None and b - a > 1:
            seen = torch.ones(b - a, b - a, dtype=torch.bool).tril()
        share = q.shape[1] // k.shape[1]
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, a:b],
                *(t.repeat_interleave(share, 1) for t in (keys, values)),
                attn_mask=seen,
            )
        )
        state.settle(q[:, :, a:b], keys, mask=seen if given is not None else None)
    return torch.cat(outputs, 2)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.97, 1.0])
@pytest.mark.parametrize("past", [0, 9])
def test_column_sums_are_those_of_the_matrix(alpha, past) -> None:
    q, k, _ = qkv(301)
    q = q[:, :, past:]
    weights = forgetting_weights(torch.ones(2, 301 - past, dtype=torch.bool), alpha)
    rows = dense(q, k)
    expected = torch.einsum("bn,bghnm->bgm", weights, rows.view(2, 2, 2, *rows.shape[2:]))
    torch.testing.assert_close(column_sums(q, k, weights), expected, rtol=1e-5, atol=1e-6)


def test_column_sums_read_masks_and_biases() -> None:
    q, k, _ = qkv(63)
    allowed = torch.ones(63, 63, dtype=torch.bool).tril() & (torch.rand(2, 1, 63, 63) < 0.6)
    allowed |= torch.eye(63, dtype=torch.bool)
    weights = torch.rand(2, 63)
    expected = torch.einsum("bn,bghnm->bgm", weights, dense(q, k, allowed).view(2, 2, 2, 63, 63))
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed, bias):
        torch.testing.assert_close(column_sums(q, k, weights, mask=mask), expected)


def test_the_matrix_of_a_prompt_is_never_held() -> None:
    q, k, _ = qkv(3001, batch=1)
    weights = torch.ones(1, 3001)
    assert largest_tensor_numel(column_sums, q, k, weights) <= 1 << 22
    assert peak_memory(column_sums, q, k, weights).peak_bytes < 4 * 3001**2 * 4 / 2
    forgetful = forgetting_weights(torch.ones(1, 3001, dtype=torch.bool), 0.2)
    assert int((forgetful > 0).sum()) < 70  # the others are not computed


def test_forgetting_is_fair_to_late_tokens() -> None:
    rows = 1 / torch.arange(1.0, 257).repeat(1, 256, 1).transpose(1, 2)
    rows = (rows * torch.ones(256, 256).tril())[None]
    state = {}
    for name, alpha in (("plain", 1.0), ("forgetting", 0.2)):
        weights = forgetting_weights(torch.ones(1, 256, dtype=torch.bool), alpha)
        score = torch.einsum("bn,bhnm->bhm", weights, rows)[0, 0]
        state[name] = float(score[0] / score[128])
    assert state["plain"] > 2
    assert state["forgetting"] < 1.1


@pytest.mark.parametrize("policy", [A2SF, H2O])
def test_prefill_in_chunks_scores_as_prefill_at_once(policy) -> None:
    q, k, v = qkv(63)
    whole, parts = (EvictionState(policy(budget=63)) for _ in range(2))
    run(whole, q, k, v)
    for a, b in ((0, 20), (20, 21), (21, 50), (50, 63)):
        keys, _ = parts.append(k[:, :, a:b], v[:, :, a:b])
        parts.mask(None, q[:, :, a:b])
        parts.settle(q[:, :, a:b], keys)
    torch.testing.assert_close(parts.held["score"], whole.held["score"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("sink", "select", "recent"), [(0, 5, 3), (2, 3, 4), (1, 6, 0)])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_cache_attends_as_its_simulation_does(sink, select, recent, alpha) -> None:
    q, k, v = qkv(41, groups=4)
    budget = sink + select + recent
    state = EvictionState(A2SF(budget=budget, sink=sink, recent=recent, alpha=alpha))
    out = run(state, q, k, v, prompt=budget)
    logits = q @ k.transpose(2, 3) * 20**-0.5
    options = {"sink": sink, "select": select, "recent": recent, "alpha": alpha}
    expected = simulate_eviction(logits, **options).attention @ v
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_what_is_protected_stays_and_the_budget_holds() -> None:
    q, k, v = qkv(90)
    for policy in (
        A2SF(budget=20, sink=3, recent=6), H2O(budget=20, sink=3), SinkRecent(budget=20, sink=3),
        SnapKV(budget=20, sink=3, window=6),
    ):  # fmt: skip
        state = EvictionState(policy)
        run(state, q, k, v, prompt=50)
        held = state.held["position"]
        assert held.shape == (2, 2, 20)
        assert (held[..., :3] == torch.arange(3)).all(), policy
        recent = policy.split(20).recent
        assert (held[..., -recent:] == torch.arange(90 - recent, 90)).all(), policy
        assert (held.diff(dim=-1) > 0).all()


def test_budgets_are_tokens_shares_or_one_a_layer() -> None:
    assert H2O(budget=0.5).budget(0, 61) == 31
    assert [H2O(budget=[4, 9]).budget(i, 100) for i in range(2)] == [4, 9]
    q, k, v = qkv(61)
    state = EvictionState(H2O(budget=[4, 9]), 1)
    run(state, q, k, v, prompt=30)
    assert len(state.held) == 9
    grows = EvictionState(SnapKV(budget=10, window=4, decode=False))
    run(grows, q, k, v, prompt=30)
    assert len(grows.held) == 10 + 31
    state = EvictionState(SnapKV(budget=0.5, window=4), prompt=60)
    run(state, q, k, v, prompt=20)
    assert len(state.held) == 30


def test_padding_is_evicted_first_and_counts_for_nothing() -> None:
    q, k, v = qkv(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :25] = False
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & real[:, None, None]
    for policy in (A2SF(budget=12, recent=3, sink=2), H2O(budget=12, sink=1)):
        padded, alone = EvictionState(policy), EvictionState(policy)
        out = run(padded, q, k, v, mask=mask, prompt=33)
        own = run(alone, q[1:, :, 25:], k[1:, :, 25:], v[1:, :, 25:], prompt=8)
        torch.testing.assert_close(out[1:, :, 25:], own, rtol=1e-4, atol=1e-5)
        assert torch.equal(padded.held["position"][1:], alone.held["position"] + 25)
        assert padded.held["valid"].all()


def test_a_row_with_fewer_tokens_than_the_budget_keeps_them_all() -> None:
    q, k, v = qkv(40)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :35] = False
    mask = torch.ones(40, 40, dtype=torch.bool).tril() & real[:, None, None]
    state = EvictionState(A2SF(budget=12, recent=3))
    out = run(state, q, k, v, mask=mask, prompt=37)
    share = dense(q[1:, :, 35:], k[1:, :, 35:]) @ v[1:, :, 35:].repeat_interleave(2, 1)
    torch.testing.assert_close(out[1:, :, 35:], share, rtol=1e-4, atol=1e-5)


def test_int8_is_held_as_int8() -> None:
    q, k, v = qkv(80, dim=64)
    wide, narrow = (EvictionState(A2SF(budget=30, bits=bits)) for bits in (None, 8))
    for state in (wide, narrow):
        run(state, q, k, v, prompt=50)
    assert narrow.held["key"].dtype == torch.int8
    assert narrow.held["value"].dtype == torch.int8
    kept = 2 * 2 * 30
    assert narrow.nbytes == kept * (2 * 64 + 2 * 4 + 4 + 1 + 4)
    assert wide.nbytes == kept * (2 * 64 * 4 + 4 + 1 + 4)
    lost = (narrow.read("key") - k.gather(2, narrow.held["position"].long()[..., None].expand(
        -1, -1, -1, 64))).abs()  # fmt: skip
    assert (lost <= narrow.held["key_scale"] * 0.51).all()
    # Without eviction, since rounding may tip which of two like tokens goes.
    all_held = [EvictionState(A2SF(budget=80, bits=bits)) for bits in (None, 8)]
    out = [run(state, q, k, v, prompt=50) for state in all_held]
    error = (out[0] - out[1]).square().mean().sqrt()
    assert 0 < error < 0.02 * out[0].square().mean().sqrt()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one"),
        ({"budget": 4, "budget_ratio": 0.5}, "exactly one"),
        ({"budget": 4, "sink": 3, "recent": 2}, "below sink"),
        ({"budget": 1.5}, "share of the prompt"),
        ({"budget": 4, "bits": 4}, "bits is 4"),
        ({"budget": 4, "alpha": 1.5}, "alpha is 1.5"),
        ({"budget": 4, "windw": 3}, "no option 'windw'"),
        ({"budget": True}, "budget is True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        A2SF(**options)


def test_other_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="leave it out"):
        SinkRecent(budget=9, recent=3)
    with pytest.raises(ValueError, match="odd width"):
        SnapKV(budget=9, pool=4)
    with pytest.raises(ValueError, match="sink-recent"):
        EvictionState(StreamingLLM(budget=9))
    with pytest.raises(ValueError, match="a layer 2"):
        H2O(budget=[4, 9]).budget(2, 10)
    with pytest.raises(ValueError, match="expected \\(B, H, N, N\\)"):
        simulate_eviction(torch.zeros(1, 1, 3, 4), select=1, recent=1)
    with pytest.raises(ValueError, match="no multiple"):
        column_sums(torch.zeros(1, 3, 4, 2), torch.zeros(1, 2, 4, 2), torch.ones(1, 4))
    state = EvictionState(H2O(budget=4))
    state.append(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(RuntimeError, match="never attended"):
        state.append(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
