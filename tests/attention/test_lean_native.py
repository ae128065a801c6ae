"""The compiled kernel of lean attention against the definition, beside the form without it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention import (
    LeanAttention,
    LeanConfig,
    lean,
    lean_packed,
    lean_paged,
    lean_reference,
)
from manyheads.attention.lean import Plan, plan
from manyheads.attention.lean import run as run_module
from manyheads.attention.lean.native import can_run
from manyheads.choose.flops import count_flops
from manyheads.native import disabled, library

needs_kernel = pytest.mark.skipif(library("lean") is None, reason="no C++ compiler")


def draw(lengths, *, group=4, kv_heads=2, queries=1, dim=20, value_dim=None, room=7):
    """Return query, key, value and lengths; what stands behind a context is NaN."""
    batch, capacity, value_dim = len(lengths), max(lengths) + room, value_dim or dim
    q = torch.randn(batch, group * kv_heads, queries, dim)
    k, v = (torch.randn(batch, kv_heads, capacity, n) for n in (dim, value_dim))
    for row, size in enumerate(lengths):
        k[row, :, size:] = v[row, :, size:] = torch.nan
    return q, k, v, torch.tensor(lengths)


def dense(q, k, v, n, is_causal=False):
    clean = (t.double().nan_to_num() for t in (q, k, v))
    return lean_reference(*clean, lengths=n, is_causal=is_causal)


def dense_lse(q, k, n, is_causal=False):
    """By the definition: a value of ones per key would give 1, so sum e^s itself."""
    scores = q.double() @ k.double().nan_to_num().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = scores * q.shape[-1] ** -0.5
    places = torch.arange(k.shape[2])
    ends = n[:, None].expand(-1, q.shape[2])
    if is_causal:
        ends = ends + torch.arange(q.shape[2]) + 1 - q.shape[2]
    hidden = places >= ends[..., None]
    return scores.masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("switch", [nullcontext, disabled])
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    workers=st.integers(1, 9),
    group=st.integers(1, 9),
    queries=st.sampled_from([1, 1, 3, 70]),
    is_causal=st.booleans(),
    dims=st.sampled_from([(20, 20), (63, 12), (5, 63), (128, 128), (80, 7)]),
    order=st.sampled_from(["head", "request"]),
)
def test_any_deal_gives_the_dense_result(
    switch, lengths, workers, group, queries, is_causal, dims, order
) -> None:
    q, k, v, n = draw(lengths, group=group, queries=queries, dim=dims[0], value_dim=dims[1])
    with switch():
        out, lse = lean(
            q, k, v, lengths=n, is_causal=is_causal, workers=workers, tile=48, order=order,
            return_lse=True,
        )  # fmt: skip
    assert_close(out, dense(q, k, v, n, is_causal), 2e-6)
    torch.testing.assert_close(lse.double(), dense_lse(q, k, n, is_causal), rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("dims", [(1, 1), (15, 17), (20, 63), (63, 20), (80, 80), (256, 256)])
@pytest.mark.parametrize("group", [1, 2, 5, 8, 13, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dims_groups_and_dtypes(dims, group, dtype) -> None:
    q, k, v, n = draw([0, 1, 131, 64], group=group, kv_heads=1, dim=dims[0], value_dim=dims[1])
    k, v = k.to(dtype), v.to(dtype)
    out = lean(q, k, v, lengths=n, workers=3, tile=64, implementation="native")
    assert_close(out, dense(q, k, v, n), 1e-6)


@needs_kernel
def test_every_number_of_half_precision_is_read() -> None:
    # One key a context: the output is its value. All 65,536 patterns, 64 a key.
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(1024, 1, 1, 64)
    q, n = torch.zeros(1024, 1, 1, 64), torch.ones(1024, dtype=torch.long)
    for dtype in (torch.float16, torch.bfloat16):
        v = bits.view(dtype)
        out = lean(q, torch.zeros_like(v), v, lengths=n, implementation="native")
        expected = v.float()
        # Sums begin with 0, and 0 + -0 is 0.
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))


@needs_kernel
def test_strided_caches_are_read_where_they_lie() -> None:
    q, k, v, n = draw([70, 0, 128, 6])
    expected = dense(q, k, v, n)
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    store = torch.full((4, 2, 200, 64), torch.nan)
    store[:, :, 9 : 9 + k.shape[2], :20] = k
    store[:, :, 9 : 9 + k.shape[2], 31:51] = v
    inside = [store[:, :, 9 : 9 + k.shape[2], a : a + 20] for a in (0, 31)]
    one = k[:1, :1, :6].contiguous()
    for keys, values in (by_token, inside):
        assert not keys.is_contiguous()
        out = lean(q, keys, values, lengths=n, workers=5, tile=16, implementation="native")
        assert_close(out, expected, 1e-6)
    shared = one.expand(4, 2, 6, 20)
    out = lean(q, shared, shared, implementation="native")
    assert_close(out, lean_reference(q.double(), *(shared.double(),) * 2), 1e-6)
    across = k.mT.contiguous().mT
    with pytest.raises(RuntimeError, match="side by side"):
        lean(q, across, v, lengths=n, implementation="native")
    assert_close(lean(q, across, v, lengths=n, workers=5), expected, 1e-6)


@pytest.mark.parametrize("switch", [nullcontext, disabled])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    page=st.sampled_from([1, 5, 16, 100]),
    tile=st.sampled_from([7, 16, 64]),
    queries=st.sampled_from([1, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_and_paged_caches(switch, lengths, page, tile, queries, dtype) -> None:
    q, k, v, n = draw(lengths, group=3, queries=queries, dim=20, value_dim=33)
    k, v = k.to(dtype), v.to(dtype)
    expected, lse = dense(q, k, v, n, True), dense_lse(q, k, n, True)
    packed = [
        torch.cat([t[b, :, :size].transpose(0, 1) for b, size in enumerate(lengths)])
        for t in (k, v)
    ]
    borders = torch.tensor([0, *lengths]).cumsum(0)
    counts = [-(-size // page) for size in lengths]
    numbers = torch.randperm(sum(counts) + 3).tolist()
    table = torch.full((len(lengths), max(counts) + 1), 10**6, dtype=torch.int32)
    stores = [torch.full((len(numbers), 2, page, t.shape[-1]), torch.nan).to(dtype) for t in (k, v)]
    for b, size in enumerate(lengths):
        for i in range(counts[b]):
            table[b, i] = number = numbers.pop()
            for store, cache in zip(stores, (k, v), strict=True):
                part = cache[b, :, i * page : min((i + 1) * page, size)]
                store[number, :, : part.shape[1]] = part
    options = {"is_causal": True, "workers": 5, "tile": tile}
    with switch():
        found = (
            lean_packed(q, *packed, borders, **options),
            lean_paged(q, *stores, table, n, **options),
        )
    for out, sums in found:
        assert_close(out, expected, 2e-6)
        torch.testing.assert_close(sums.double(), lse, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_the_kernel_is_what_runs(monkeypatch) -> None:
    calls = []
    kept = run_module.run_native

    def counted(*args, **kwargs):
        calls.append(1)
        return kept(*args, **kwargs)

    monkeypatch.setattr(run_module, "run_native", counted)
    q, k, v, n = draw([70, 33])
    lean(q, k, v, lengths=n)
    lean(q, k[:, :, :33], v[:, :, :33])
    lean(q.bfloat16(), k.bfloat16(), v.bfloat16(), lengths=n)
    assert len(calls) == 3
    lean(q.double(), k.double(), v.double(), lengths=n, workers=2)
    lean(q, k, v, lengths=n, implementation="lean")
    with disabled():
        lean(q, k, v, lengths=n, workers=2)
    counted_flops = count_flops(lambda: lean(q, k, v, lengths=n, workers=2))
    assert counted_flops.total > 0
    assert len(calls) == 3
    layer = LeanAttention(LeanConfig(embed_dim=60, num_heads=6, num_kv_heads=2))
    x = torch.randn(2, 40, 60)
    with torch.no_grad():
        _, state = layer.update(x[:, :-1], layer.init_state(2))
        calls.clear()
        out, _ = layer.step(x[:, -1], state)
        assert calls == [1]
        assert_close(out, layer(x)[:, -1], 1e-5)


def test_what_cannot_be_had_is_said() -> None:
    q, k, v, n = draw([40, 20])
    with disabled(), pytest.raises(RuntimeError, match="switched off"):
        lean(q, k, v, lengths=n, implementation="native")
    with pytest.raises(RuntimeError, match="float32"):
        lean(q.double(), k.double(), v.double(), lengths=n, implementation="native")
    packed = [t[0].transpose(0, 1) for t in (k, v)]
    with disabled(), pytest.raises(RuntimeError, match="switched off"):
        lean_packed(q, *packed, torch.tensor([0, 40, 47]), implementation="native")
    with pytest.raises(ValueError, match="unknown implementation"):
        lean_packed(q, *packed, torch.tensor([0, 40, 47]), implementation="sdpa")
    assert not can_run(q, k, v.bfloat16())


@needs_kernel
@pytest.mark.parametrize("factor", [0.0, 1e18])
def test_extreme_scores(factor) -> None:
    q, k, v, n = draw([100, 0, 40], queries=3)
    q, k, v = q * factor, k * factor, v.nan_to_num()
    out = lean(q, k, v, lengths=n, is_causal=True, workers=4, tile=8, implementation="native")
    assert_close(out, dense(q, k, v, n, True), 1e-6)
    nothing, lse = lean(q, k, v, lengths=n * 0, return_lse=True)
    assert (nothing == 0).all()
    assert lse.isneginf().all()
    none = lean(q[:0], k[:0], v[:0], implementation="native")
    assert none.shape == (0, 8, 3, 20)
    assert (lean(q, k[:, :, :0], v[:, :, :0], implementation="native") == 0).all()


@needs_kernel
def test_threads_do_not_change_a_bit() -> None:
    q, k, v, n = draw([3000, 500, 0], dim=32)
    before = torch.get_num_threads()
    dealt: Plan = plan([3000, 500, 0], heads=2, workers=6)
    try:
        torch.set_num_threads(2)
        threaded = lean(q, k, v, lengths=n, plan=dealt, implementation="native")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded, lean(q, k, v, lengths=n, plan=dealt, implementation="native"))


@pytest.mark.parametrize("switch", [nullcontext, disabled])
@pytest.mark.parametrize("ragged", [True, False])
def test_compiles_whole(switch, ragged) -> None:
    q, k, v, n = draw([63, 20], room=0)
    k, v = k.nan_to_num(), v.nan_to_num()
    fn = torch.compile(
        lambda q, k, v, n: lean(q, k, v, lengths=n if ragged else None),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = lean_reference(q.double(), k.double(), v.double(), lengths=n if ragged else None)
    with switch():
        assert_close(fn(q, k, v, n), expected, 1e-6)


def test_gradients_of_the_kernels_result() -> None:
    q, k, v, n = draw([63, 0, 30], queries=3, value_dim=12)
    leaves = [t.nan_to_num().requires_grad_() for t in (q, k, v)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    out = lean(*leaves, lengths=n, is_causal=True, workers=3, tile=16)
    expected = lean_reference(*doubles, lengths=n, is_causal=True)
    cotangent = torch.randn_like(out)
    one = torch.autograd.grad(out, leaves, cotangent)
    two = torch.autograd.grad(expected, doubles, cotangent.double())
    for a, b, name in zip(one, two, ("query", "key", "value"), strict=True):
        assert_close(a, b, 1e-5, name)
