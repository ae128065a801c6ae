"""Lean attention beyond the contract: ragged caches, plans, merges, gradients, pages, threads."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention import (
    LeanAttention,
    LeanConfig,
    SoftmaxAttention,
    SoftmaxConfig,
    lean,
    lean_packed,
    lean_paged,
    lean_reference,
    lean_step,
    lean_update,
    merge_partials,
)
from manyheads.attention.lean import (
    Partial,
    aiter_schedule,
    empty_partial,
    flash_splits,
    lean_partials,
    lean_weights,
    partial_attention,
    plan,
)
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import peak_memory
from manyheads.layers.ragged import compact

lengths_of_batches = st.lists(st.integers(0, 90), min_size=1, max_size=4)


def draw(lengths, *, heads=4, kv_heads=2, queries=1, dim=20, value_dim=None, room=7):
    batch, capacity = len(lengths), max(lengths) + room
    q = torch.randn(batch, heads, queries, dim).double()
    k = torch.randn(batch, kv_heads, capacity, dim).double()
    v = torch.randn(batch, kv_heads, capacity, value_dim or dim).double()
    return q, k, v, torch.tensor(lengths)


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_of_batches,
    heads=st.integers(1, 3),
    workers=st.integers(1, 40),
    tile=st.sampled_from([1, 7, 16]),
    order=st.sampled_from(["head", "request"]),
    queries=st.sampled_from([1, 5, 23]),
    query_tile=st.sampled_from([4, 64]),
    is_causal=st.booleans(),
)
def test_every_tile_is_dealt_once_and_evenly(
    lengths, heads, workers, tile, order, queries, query_tile, is_causal
) -> None:
    dealt = plan(
        lengths, heads=heads, workers=workers, tile=tile, order=order, queries=queries,
        query_tile=query_tile, is_causal=is_causal,
    )  # fmt: skip
    seen = [(s.request, s.head, s.block, t) for s in dealt.segments for t in range(s.first, s.end)]
    wanted = {
        (b, h, i, t)
        for b, blocks in enumerate(dealt.tiles)
        for h in range(heads)
        for i, number in enumerate(blocks)
        for t in range(number)
    }
    assert len(seen) == len(set(seen)) == dealt.total
    assert set(seen) == wanted
    assert dealt.workers == min(workers, dealt.total)
    if dealt.total:
        assert max(dealt.loads) - min(dealt.loads) <= 1
        assert list(dealt.loads) == sorted(dealt.loads, reverse=True)
    others = [s.worker for s in dealt.segments if not s.host]
    assert len(others) == len(set(others)), "one place to write a part to is enough for a worker"
    assert sum(r.heads for own in dealt.runs for r in own) == len(dealt.segments)


@settings(max_examples=40, deadline=None)
@given(
    lengths=lengths_of_batches,
    workers=st.integers(1, 9),
    order=st.sampled_from(["head", "request"]),
    queries=st.sampled_from([1, 3, 70]),
    is_causal=st.booleans(),
    value_dim=st.sampled_from([20, 12]),
)
def test_any_deal_gives_the_dense_result(
    lengths, workers, order, queries, is_causal, value_dim
) -> None:
    q, k, v, n = draw(lengths, queries=queries, value_dim=value_dim)
    # What stands behind a context must not be looked at.
    for row, size in enumerate(lengths):
        k[row, :, size:] = v[row, :, size:] = torch.nan
    clean = k.nan_to_num(), v.nan_to_num()
    arguments = {"lengths": n, "is_causal": is_causal}
    out, lse = lean(
        q, k, v, workers=workers, tile=16, order=order, return_lse=True, **arguments
    )  # fmt: skip
    assert_close(out, lean_reference(q, *clean, **arguments), 1e-10)
    scores = q @ clean[0].repeat_interleave(2, 1).mT * 20**-0.5
    allowed = lean_weights(q, clean[0], **arguments) > 0
    expected = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=1e-10, atol=1e-10)


def test_long_ragged_batches_in_single_precision() -> None:
    lengths = [1, 5000, 37, 2048]
    q, k, v, n = draw(lengths, heads=6, dim=64)
    out = lean(q.float(), k.float(), v.float(), lengths=n, workers=7)
    expected = lean_reference(q, k, v, lengths=n)
    assert float((out - expected).abs().max()) <= 1e-5
    half = [t.bfloat16() for t in (q, k, v)]
    wide = lean_reference(*(t.double() for t in half), lengths=n)
    assert_close(lean(*half, lengths=n, workers=7), wide, 5e-3)


@pytest.mark.parametrize("queries", [1, 3, 70])
@pytest.mark.parametrize("is_causal", [True, False])
def test_gradients(queries, is_causal) -> None:
    q, k, v, n = draw([63, 0, 30], queries=queries, value_dim=12)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = lean(
        *leaves, lengths=n, is_causal=is_causal, workers=3, tile=16, return_lse=True
    )  # fmt: skip
    expected = lean_reference(*leaves, lengths=n, is_causal=is_causal)
    cotangent = torch.randn_like(out)
    one = torch.autograd.grad((out * cotangent).sum(), leaves, retain_graph=True)
    two = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for a, b, name in zip(one, two, ("query", "key", "value"), strict=True):
        assert_close(a, b, 1e-9, name)
    weights = lean_weights(q, k, lengths=n, is_causal=is_causal)
    down = torch.randn_like(lse) * torch.isfinite(lse)
    (grad,) = torch.autograd.grad((lse.nan_to_num(neginf=0) * down).sum(), [q])
    key = k.repeat_interleave(2, 1)
    assert_close(grad, (weights * down[..., None]) @ key * 20**-0.5, 1e-9, "of the lse")


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("where", ["mask", "cu_seqlens", "lengths"])
def test_padding_and_packing_through_lean_itself(is_causal, where) -> None:
    q, k, v, _ = draw([63] * 3, queries=63, room=0)
    if where == "cu_seqlens":
        borders = torch.tensor([0, 7, 7, 40, 63])
        given_ = {"cu_seqlens": borders, "is_causal": is_causal}
        one = [t[:1] for t in (q, k, v)]
        out = lean(*one, implementation="lean", workers=3, tile=8, **given_)
        for a, b in ((0, 7), (7, 40), (40, 63)):
            alone = lean_reference(*(t[:, :, a:b] for t in one), is_causal=is_causal)
            assert_close(out[:, :, a:b], alone, 1e-10)
        return
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[0, :9] = mask[1, 50:] = mask[2, 11:14] = False
    if where == "lengths":
        mask[:] = torch.arange(63) < torch.tensor([54, 50, 60])[:, None]
    out = lean(
        q, k, v, mask=mask, is_causal=is_causal, implementation="lean", workers=3, tile=8
    )  # fmt: skip
    real = mask[:, None, :, None]
    expected = lean_reference(q, k, v, mask=mask, is_causal=is_causal)
    assert_close(out * real, expected * real, 1e-10)
    if where == "lengths":
        last = [t[:, :, -5:] for t in (compact(~mask).gather(q, dim=2),)]
        few = lean(
            *last, k, v, lengths=mask.sum(1), is_causal=is_causal, workers=4, tile=8
        )  # fmt: skip
        whole = compact(~mask).gather(expected, dim=2)[:, :, -5:]
        assert_close(few, whole, 1e-10)


@pytest.mark.parametrize("implementation", ["auto", "lean", "sdpa"])
def test_blocks_and_tokens_continue_a_cache(implementation) -> None:
    q, k, v, _ = draw([90] * 3, queries=90, room=0)
    mask = torch.ones(3, 90, dtype=torch.bool)
    mask[0, :9] = mask[1, 25:30] = mask[2, 35:40] = False
    options = {"implementation": implementation, "workers": 3, "tile": 16}
    outputs, state = [], None
    for a, b in ((0, 30), (30, 40), (40, 80)):
        out, state = lean_update(
            state, *(t[:, :, a:b] for t in (q, k, v)), mask=mask[:, a:b], **options
        )  # fmt: skip
        outputs.append(out)
    for t in range(80, 90):
        one, state = lean_step(state, *(x[:, :, t] for x in (q, k, v)), **options)
        outputs.append(one[:, :, None])
    whole = lean_reference(q, k, v, is_causal=True, mask=mask) * mask[:, None, :, None]
    assert_close(torch.cat(outputs, 2), whole, 1e-10)
    assert state.length.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize("page", [4, 16, 128])
@pytest.mark.parametrize("queries", [1, 6])
def test_packed_and_paged_caches(page, queries) -> None:
    lengths = [70, 0, 128, 6]
    q, k, v, n = draw(lengths, queries=queries)
    expected = lean(q, k, v, lengths=n, is_causal=True, workers=5, tile=16, return_lse=True)
    packed = [
        torch.cat([t[b, :, :size].transpose(0, 1) for b, size in enumerate(lengths)])
        for t in (k, v)
    ]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    options = {"is_causal": True, "workers": 5, "tile": 16}
    pages = 40 * 16 // page
    numbers = torch.randperm(pages)
    table = torch.full((4, -(-128 // page)), 10**6)
    stores = [torch.full((pages, 2, page, 20), torch.nan).double() for _ in range(2)]
    taken = 0
    for b, size in enumerate(lengths):
        for i in range(-(-size // page)):
            table[b, i] = number = numbers[taken]
            taken += 1
            for store, cache in zip(stores, (k, v), strict=True):
                part = cache[b, :, i * page : min((i + 1) * page, size)]
                store[number, :, : part.shape[1]] = part
    for got in (
        lean_packed(q, *packed, borders, **options),
        lean_paged(q, *stores, table, n, **options),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_parts_merge_in_any_grouping() -> None:
    q = torch.randn(3, 8).double()
    keys, values = torch.randn(50, 8).double(), torch.randn(50, 8).double()
    cuts = [0, 1, 1, 20, 49, 50]  # one of them empty
    parts = [partial_attention(q, keys[a:b], values[a:b]) for a, b in pairwise(cuts)]

    def stack(some):
        return Partial(*map(torch.stack, zip(*some, strict=True)))

    whole = merge_partials(stack(parts))
    expected = (q @ keys.mT * 8**-0.5).softmax(-1) @ values
    assert_close(whole.out, expected, 1e-12)
    identity = empty_partial(3, dim=8, like=q)
    left = merge_partials(stack([merge_partials(stack(parts[:2])), *parts[2:], identity]))
    for a, b in zip(left, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    nothing = merge_partials(stack([identity, identity]))
    assert nothing.m.isneginf().all()
    assert (nothing.out == 0).all()
    by_id = merge_partials(stack(parts), torch.tensor([2, 0, 0, 2, 2]), count=4)
    assert_close(by_id.out[2], merge_partials(stack([parts[0], *parts[3:]])).out, 1e-12)
    for a, b in zip(merge_partials(stack(parts[1:3])), by_id, strict=True):
        torch.testing.assert_close(b[0], a, rtol=1e-12, atol=1e-12)
    assert by_id.lse[3].isneginf().all()
    with pytest.raises(ValueError, match="count - 1"):
        merge_partials(stack(parts), torch.tensor([0, 1, 2, 3, 4]), count=3)
    with pytest.raises(ValueError, match="one id for each part"):
        merge_partials(stack(parts), torch.tensor([0]))


def test_the_merge_has_gradients() -> None:
    q, k, v = (torch.randn(n, 8).double().requires_grad_() for n in (3, 50, 50))
    parts = [partial_attention(q, k[a:b], v[a:b]) for a, b in ((0, 7), (7, 50))]
    ids = torch.zeros(2, dtype=torch.long)
    stacked = Partial(*map(torch.stack, zip(*parts, strict=True)))
    for whole in (merge_partials(stacked).out, merge_partials(stacked, ids).out[0]):
        dense = (q @ k.mT * 8**-0.5).softmax(-1) @ v
        cotangent = torch.randn_like(dense)
        one = torch.autograd.grad((whole * cotangent).sum(), (q, k, v), retain_graph=True)
        two = torch.autograd.grad((dense * cotangent).sum(), (q, k, v))
        for a, b in zip(one, two, strict=True):
            assert_close(a, b, 1e-10)


def test_segments_of_a_plan_are_parts_of_the_whole() -> None:
    q, k, v, n = draw([70, 33], heads=4, kv_heads=2)
    dealt = plan([70, 33], heads=2, workers=5, tile=16)
    parts = lean_partials(q, k, v, dealt, lengths=n)
    assert len(parts) == len(dealt.segments)
    ids = torch.tensor([s.request * 2 + s.head for s in dealt.segments])
    whole = merge_partials(Partial(*map(torch.stack, zip(*parts, strict=True))), ids)
    expected = lean_reference(q, k, v, lengths=n)
    assert_close(whole.out.reshape(2, 4, 1, 20), expected, 1e-10)
    assert_close(lean(q, k, v, lengths=n, plan=dealt), expected, 1e-10)


def test_a_plan_serves_while_lengths_stay_inside_their_tiles() -> None:
    first = plan([250, 10], heads=2, workers=3, tile=64)
    assert plan([255, 60], heads=2, workers=3, tile=64) is first
    assert first.fits([256, 64])
    assert not first.fits([257, 64])
    assert first.num_splits >= 2
    assert first.balance == pytest.approx(10 / 12)
    q, k, v, _ = draw([257, 64])
    with pytest.raises(ValueError, match="other lengths"):
        lean(q, k, v, lengths=torch.tensor([257, 64]), plan=first)
    with pytest.raises(ValueError, match="2 key-value heads"):
        lean(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), plan=first)


def test_threads_change_neither_result_nor_settings() -> None:
    q, k, v, n = draw([3000, 500, 0], dim=32)
    q, k, v = (t.float().requires_grad_() for t in (q, k, v))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            threaded = lean(q, k, v, lengths=n, workers=6)
        with torch.inference_mode():
            inferred = lean(q, k, v, lengths=n, workers=6)
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [2]
        counted = count_flops(lambda: lean(q.detach(), k, v, lengths=n, workers=6))
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        alone = lean(q, k, v, lengths=n, workers=6)
    assert torch.equal(threaded, alone)
    assert torch.equal(inferred, alone)
    assert not threaded.requires_grad
    assert counted.total >= 2 * 4 * 3500 * 64


def test_scores_of_the_whole_context_are_never_made() -> None:
    q, k, v = (torch.randn(1, h, n, 64) for h, n in ((16, 1), (1, 1 << 17), (1, 1 << 17)))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [t.to(dtype) for t in (q, k, v)]
        with torch.no_grad():
            peak = peak_memory(lambda inputs=inputs: lean(*inputs, workers=4))
        assert peak.peak_bytes < 4 * 16 * (1 << 17)


def test_compiles_with_lengths() -> None:
    q, k, v, n = draw([63, 20])
    fn = torch.compile(
        lambda q, k, v, n: lean(q, k, v, lengths=n, workers=2, tile=16),
        fullgraph=True,
        backend="aot_eager",
    )
    q.requires_grad_()
    out, expected = fn(q, k, v, n), lean_reference(q, k, v, lengths=n)
    assert_close(out, expected, 1e-10)
    one, two = (torch.autograd.grad(t.square().sum(), q)[0] for t in (out, expected))
    assert_close(one, two, 1e-9)


def test_extreme_scores_and_empty_contexts() -> None:
    for factor in (0.0, 1.0, 1e18):
        q, k, v, n = draw([40, 0], queries=3)
        q, k = (q.float() * factor).requires_grad_(), (k.float() * factor).requires_grad_()
        out = lean(q, k, v.float(), lengths=n, is_causal=True, workers=4, tile=8)
        assert torch.isfinite(out).all()
        assert (out[1] == 0).all()
        for grad in torch.autograd.grad(out.square().sum(), (q, k)):
            assert torch.isfinite(grad).all()
    nothing = lean(q, k, v.float(), lengths=torch.tensor([0, 0]), workers=3)
    assert (nothing == 0).all()
    with torch.no_grad():
        short = lean(q[:, :, :1], k, v.float(), lengths=n)
    assert (short[1] == 0).all()


def test_the_layer_is_softmax_with_the_same_weights() -> None:
    sizes = {"embed_dim": 60, "num_heads": 6, "num_kv_heads": 2}
    ours = LeanAttention(LeanConfig(**sizes, workers=3, tile=16)).double()
    theirs = SoftmaxAttention(SoftmaxConfig(**sizes)).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 100, 60).double()
    with torch.no_grad():
        first, state = ours.update(x[:, :90], ours.init_state(2))
        outputs = [first]
        for t in range(90, 100):
            one, state = ours.step(x[:, t], state)
            outputs.append(one[:, None])
        assert_close(torch.cat(outputs, 1), theirs(x), 1e-10)
        assert_close(ours(x), theirs(x), 1e-12)


def test_rules_of_the_schedulers_at_their_edges() -> None:
    assert flash_splits(87, 2048, sms=108) == 1
    assert flash_splits(86, 2048, sms=108) > 1
    assert flash_splits(8, 2048, sms=108, rule="none") == 1
    assert flash_splits(1, 0, sms=108) == 1
    assert aiter_schedule([0], heads=2, workers=8).largest == 0
    assert aiter_schedule([64], heads=1, workers=8) == (1, 1, 1, 1, True)


def test_errors_name_the_fix() -> None:
    q, k, v, n = draw([40, 20])
    with pytest.raises(ValueError, match="outside of 0 to"):
        lean(q, k, v, lengths=n + 30)
    with pytest.raises(ValueError, match=r"\(batch,\) = \(2,\)"):
        lean(q, k, v, lengths=n[:1])
    with pytest.raises(ValueError, match="not both"):
        lean(q, k, v, lengths=n, mask=torch.ones(2, 47, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown implementation"):
        lean(q, k, v, implementation="leen")
    with pytest.raises(ValueError, match="unknown order"):
        lean(q, k, v, order="heads")
    with pytest.raises(ValueError, match="causal only for"):
        lean(q.repeat(1, 1, 3, 1), k, v, is_causal=True, implementation="sdpa")
    with pytest.raises(ValueError, match="workers 0"):
        lean(q, k, v, workers=0)
    with pytest.raises(ValueError, match="no gradient"):
        lean_packed(q.requires_grad_(), k[0].transpose(0, 1), v[0].transpose(0, 1),
                    torch.tensor([0, 40, 47]))  # fmt: skip
    with pytest.raises(ValueError, match="names page 9"):
        lean_paged(q.detach(), k, v, torch.tensor([[0], [9]]), n)
    with pytest.raises(ValueError, match="tile 0"):
        LeanConfig(embed_dim=8, num_heads=2, tile=0)
