"""Flow attention beyond the contract: conservation, variants of the code, masks, states, memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_close
from manyheads.attention import (
    FlowAttention,
    FlowConfig,
    FlowState,
    flow,
    flow_flows,
    flow_reference,
    flow_step,
    flow_update,
    flow_weights,
)
from manyheads.attention.flow import bidirectional
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import largest_tensor_numel, peak_memory
from manyheads.layers.state import state_bytes
from manyheads.registry import Shape, get_mechanism

OPTIONS = [
    {},
    {"clamp": None},
    {"clamp": 0.3},
    {"clamp": 5.0, "outer_eps": 1e-6},
    {"kernel": "relu", "clamp": None},
    {"kernel": torch.nn.functional.softplus, "eps": 0.01, "outer_eps": 0.1},
]


def draw(batch=1, heads=2, kv_heads=2, sinks=63, sources=63, dim=20, value=12, dtype=torch.float64):
    q = torch.randn(batch, heads, sinks, dim, dtype=dtype)
    k = torch.randn(batch, kv_heads, sources, dim, dtype=dtype)
    v = torch.randn(batch, kv_heads, sources, value, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v)]


def compare(tensors: list[Tensor], limit: float = 1e-9, **options) -> None:
    """Outputs and gradients of the fast form against the definition."""
    chunk = {"chunk_size": options.pop("chunk_size")} if "chunk_size" in options else {}
    out = flow(*tensors, **options, **chunk)
    expected = flow_reference(*tensors, **options)
    assert_close(out, expected, limit, "out")
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, cotangent)
    wanted = torch.autograd.grad(expected, tensors, cotangent)
    for name, a, e in zip("qkv", grads, wanted, strict=True):
        assert_close(a, e, 10 * limit, f"gradient of {name}")


@settings(max_examples=30, deadline=None)
@given(
    is_causal=st.booleans(),
    length=st.integers(1, 90),
    batch=st.sampled_from([1, 3]),
    groups=st.sampled_from([1, 2]),
    chunk_size=st.sampled_from([1, 7, 16, 64]),
    options=st.sampled_from(OPTIONS),
    masked=st.booleans(),
)
def test_fast_forms_are_the_definition(
    is_causal, length, batch, groups, chunk_size, options, masked
) -> None:
    torch.manual_seed(length)
    tensors = draw(batch, 2, 2 // groups, length, length)
    mask = torch.rand(batch, length) > 0.3 if masked else None
    if mask is not None:
        mask[0, length // 2] = True  # the mean over an empty batch of tokens is not compared
    compare(tensors, is_causal=is_causal, chunk_size=chunk_size, mask=mask, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("sinks", "sources"), [(7, 63), (63, 7), (1, 130)])
@pytest.mark.parametrize("batch", [1, 3])
def test_cross_attention_with_masks_of_both_sides(options, sinks, sources, batch) -> None:
    tensors = draw(batch, sinks=sinks, sources=sources)
    compare(tensors, **options)
    mask, query_mask = torch.rand(batch, sources) > 0.4, torch.rand(batch, sinks) > 0.4
    mask[:, 0] = query_mask[:, 0] = True
    compare(tensors, mask=mask, query_mask=query_mask, **options)
    out = flow(*tensors, mask=mask, query_mask=query_mask, **options)
    for row in range(batch):
        q, k, v = (t[row : row + 1] for t in tensors)
        real, used = query_mask[row], mask[row]
        alone = flow(q[:, :, real], k[:, :, used], v[:, :, used], **options)
        assert_close(out[row : row + 1, :, real], alone, 1e-9, f"row {row}")
        assert (out[row, :, ~real] == 0).all()


def test_tiles_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers in (1, 2 * 63 * 20, 5 * 63 * 20):
        monkeypatch.setattr(bidirectional, "_TILE_NUMBERS", numbers)
        compare(draw(3, heads=3, kv_heads=3))


def test_strided_inputs_and_gradients() -> None:
    """Heads split off a (B, N, C) tensor are not contiguous; neither is what comes back."""
    tensors = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in draw(3)]
    for is_causal in (False, True):
        compare([t.requires_grad_() for t in tensors], is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kernel", ["sigmoid", "relu"])
def test_flows_are_conserved(is_causal, kernel) -> None:
    """With eps = 0 each source gives 1 and each sink takes 1."""
    q, k, _ = (t.detach() for t in draw(3, sinks=63, sources=63 if is_causal else 40))
    flows = flow_flows(q, k, is_causal=is_causal, kernel=kernel, eps=0.0)
    phi = torch.sigmoid if kernel == "sigmoid" else lambda x: torch.relu(x) + 1e-6
    capacity = phi(q) @ phi(k).mT
    given, taken = capacity, capacity
    if is_causal:
        taken, given = capacity.tril(), capacity.triu()
    ones = torch.ones_like(flows.incoming)
    assert_close((taken / flows.incoming[..., None]).sum(-1), ones, 1e-5, "sinks")
    ones = torch.ones_like(flows.outgoing)
    assert_close((given / flows.outgoing[..., None, :]).sum(-2), ones, 1e-5, "sources")
    if not is_causal:
        # All sources together give M, all sinks together take N.
        whole = torch.full_like(flows.incoming[..., 0], k.shape[2])
        assert_close(flows.conserved_sink.sum(-1), whole, 1e-5)
        whole = torch.full_like(whole, q.shape[2])
        assert_close(flows.conserved_source.sum(-1), whole, 1e-5)
        whole = torch.full_like(whole, k.shape[2])
        assert_close(flows.source_competition.sum(-1), whole, 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_factor_on_the_capacities_cancels(is_causal) -> None:
    """Why there is no ``scale``."""
    tensors = [t.detach() for t in draw()]
    scaled = flow(*tensors, is_causal=is_causal, eps=0.0, kernel=lambda x: 0.1 * x.sigmoid())
    assert_close(scaled, flow(*tensors, is_causal=is_causal, eps=0.0), 1e-9)


def test_order_of_tokens_does_not_matter() -> None:
    q, k, v = (t.detach() for t in draw(sources=40))
    order, other = torch.randperm(40), torch.randperm(63)
    moved = flow(q[:, :, other], k[:, :, order], v[:, :, order])
    assert_close(moved, flow(q, k, v)[:, :, other], 1e-9)


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 150), cut=st.integers(1, 149), chunk=st.sampled_from([1, 16, 64]))
def test_a_prefix_is_blind_to_what_follows(length, cut, chunk) -> None:
    torch.manual_seed(length)
    cut = min(cut, length - 1)
    q, k, v = (t.detach().float() for t in draw(sinks=length, sources=length))
    whole = flow(q, k, v, is_causal=True, chunk_size=chunk)
    parts = (t[:, :, :cut] for t in (q, k, v))
    assert_close(whole[:, :, :cut], flow(*parts, is_causal=True, chunk_size=chunk), 1e-6)


def test_weights_times_values_are_the_outputs() -> None:
    q, k, v = (t.detach() for t in draw(3))
    mask = torch.rand(3, 63) > 0.3
    for is_causal in (False, True):
        weights = flow_weights(q, k, is_causal=is_causal, mask=mask)
        out = flow(q, k, v, is_causal=is_causal, mask=mask)
        assert_close(weights @ v, out, 1e-9)
        assert (weights >= 0).all()
        assert (weights[~mask[:, None, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_flow_through_the_state(options) -> None:
    """Two blocks joined by their state have the gradients of one call, the first state's too."""
    leaves = draw(3, sinks=130, sources=130)
    first = [torch.rand(3, 2, 20).double() for _ in range(4)]
    first = [*first, torch.randn(3, 2).double(), torch.randn(3, 2, 20, 12).double()]
    first = [t.requires_grad_() for t in first]
    cotangent = torch.randn(3, 2, 130, 12).double()
    finals = [torch.randn_like(t) for t in first]
    results = []
    for borders in ((0, 130), (0, 37, 130)):
        state, parts = FlowState(*first, torch.tensor([5, 0, 9])), []
        for a, b in pairwise(borders):
            out, state = flow_update(state, *(t[:, :, a:b] for t in leaves), **options)
            parts.append(out)
        total = (torch.cat(parts, 2) * cotangent).sum()
        total = total + sum((t * f).sum() for t, f in zip(state, finals, strict=False))
        results.append(torch.autograd.grad(total, [*leaves, *first]))
    for name, a, e in zip(("q", "k", "v", *FlowState._fields), *results, strict=False):
        assert_close(a, e, 1e-8, f"gradient of {name}")


def test_steps_follow_a_padded_block_and_packed_sequences() -> None:
    q, k, v = (t.detach() for t in draw(3, sinks=20, sources=20))
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :4] = mask[1, 11:17] = False
    mask[2, :18] = False
    _, state = flow_update(None, *(t[:, :, :18] for t in (q, k, v)), mask=mask[:, :18])
    assert state.length.tolist() == [14, 12, 0]
    packed = [torch.cat([t[i, :, :18][:, mask[i, :18]] for i in range(3)], 1) for t in (q, k, v)]
    borders = torch.tensor([0, 14, 26, 26])
    _, by_sequence = flow_update(None, *(t[None] for t in packed), cu_seqlens=borders)
    for a, b in zip(state, by_sequence, strict=True):
        torch.testing.assert_close(a, b)
    whole = flow(q, k, v, is_causal=True, mask=mask)
    for t in (18, 19):
        out, state = flow_step(state, q[:, :, t], k[:, :, t], v[:, :, t])
        assert_close(out, whole[:, :, t], 1e-9)


def test_padding_leaves_the_state_alone() -> None:
    q, k, v = (t.detach() for t in draw(2))
    nothing = torch.zeros(2, 63, dtype=torch.bool)
    _, before = flow_update(None, q, k, v)
    for state in (before, None):
        out, after = flow_update(state, q, k, v, mask=nothing)
        assert (out == 0).all()
        _, empty = flow_update(state, *(t[:, :, :0] for t in (q, k, v)))
        for a, b in zip(after, empty, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("is_causal", [False, True])
def test_half_precision_sums_do_not_overflow(is_causal) -> None:
    """The flows of 4096 tokens pass 65504, the largest float16."""
    q, k, v = (torch.randn(1, 1, 4096, 64) for _ in range(3))
    q, k = q + 2, k + 2
    assert flow_flows(q, k).incoming.max() > 65504
    out = flow(q.half(), k.half(), v.half(), is_causal=is_causal)
    assert out.dtype == torch.float16
    assert_close(out.float(), flow(q, k, v, is_causal=is_causal), 1e-2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("clamp", [1.0, None])
@pytest.mark.parametrize("kernel", ["sigmoid", "relu"])
def test_extremes_are_finite_and_right(is_causal, clamp, kernel) -> None:
    """Zero keys, saturated maps, keys that grow without bound: forward and backward."""
    options = {"is_causal": is_causal, "clamp": clamp, "kernel": kernel}
    for query_factor, key_factor in ((0.0, 0.0), (1e4, 1e4), (-1e4, 1.0), (1.0, -1e4)):
        q, k, v = (t.detach().float() for t in draw(2))
        q = q.abs() * query_factor if query_factor < 0 else q * query_factor
        k = k.abs() * key_factor if key_factor < 0 else k * key_factor
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = flow(*leaves, **options)
        exact = flow_reference(*(t.detach().double() for t in leaves), **options)
        assert_close(out, exact, 1e-4, f"{query_factor}, {key_factor}")
        for grad in torch.autograd.grad(out.square().mean(), leaves):
            assert torch.isfinite(grad).all()


def test_growing_keys_need_no_clamp() -> None:
    """The conserved flow of a late large key is far above 88, where float32's exp ends."""
    q, k, v = (t.detach() for t in draw())
    k = (k.abs() * torch.logspace(-3, 6, 63)[:, None]).double()
    k[:, :, -1] *= 1e6
    options = {"is_causal": True, "clamp": None, "kernel": "relu"}
    assert flow_flows(q, k, is_causal=True, kernel="relu").conserved_source.max() > 88
    tensors = [t.requires_grad_() for t in (q, k, v)]
    compare(tensors, **options)
    narrow = [t.detach().float() for t in tensors]
    assert_close(flow(*narrow, **options), flow_reference(*tensors, **options), 1e-4)


def test_causal_memory_does_not_grow_with_key_times_value_dim() -> None:
    length, dim = 1024, 32
    q, k, v = draw(sinks=length, sources=length, dim=dim, value=dim, dtype=torch.float32)

    def both() -> None:
        torch.autograd.grad(flow(q, k, v, is_causal=True).sum(), (q, k, v))

    # The scores of the chunks (H, N, 64) are the largest: neither (N, N) nor (N, D, V).
    assert largest_tensor_numel(both) <= 2 * length * 68
    assert peak_memory(both).peak_bytes < 4 * q.numel() * 40 < 4 * 2 * length * dim * dim * 2
    with torch.no_grad():
        inference = peak_memory(lambda: flow(q, k, v, is_causal=True))
    assert inference.peak_bytes < 4 * q.numel() * 20


def test_bidirectional_memory_is_a_few_times_the_input() -> None:
    q, k, v = draw(sinks=2048, sources=2048, dim=32, value=32, dtype=torch.float32)
    kept = peak_memory(lambda: flow(q, k, v))
    assert kept.retained_bytes < 4 * q.numel() * 1.5
    peak = peak_memory(lambda: torch.autograd.grad(flow(q, k, v).sum(), (q, k, v)))
    assert peak.peak_bytes < 4 * q.numel() * 14
    assert peak.largest_tensor_bytes < 4 * 2048 * 2048 / 8


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [63, 512])
def test_flops_are_counted_as_stated(is_causal, length) -> None:
    m = get_mechanism("flow")
    shape = Shape(heads=3, length=length, head_dim=20, value_dim=12, is_causal=is_causal)
    inputs = m.inputs(shape)
    with torch.no_grad():
        assert count_flops(lambda: flow(**inputs, is_causal=is_causal)).total == m.flops(shape)


def test_state_does_not_grow() -> None:
    sizes = []
    for length in (10, 500):
        _, state = flow_update(None, *draw(sinks=length, sources=length, dtype=torch.float32))
        sizes.append(state_bytes(state))
    assert sizes[0] == sizes[1]


def test_gradients_can_come_from_the_state_alone() -> None:
    tensors = draw()
    _, state = flow_update(None, *tensors)
    total = state.memory.sum() + state.competition.sum()
    grads = torch.autograd.grad(total, tensors, allow_unused=True)
    assert all(g is not None and torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: flow(q, k[:, :, 1:], v[:, :, 1:], is_causal=True), "one key for each"),
        (lambda q, k, v: flow(q, k, v, kernel="sigmiod"), "did you mean 'sigmoid'"),
        (lambda q, k, v: flow(q, k, v, clamp=0.0), "clamp 0.0"),
        (lambda q, k, v: flow(q, k, v, eps=-1e-6), "eps -1e-06"),
        (lambda q, k, v: flow(q, k, v, chunk_size=0, is_causal=True), "chunk_size 0"),
        (lambda q, k, v: flow(q, k, v, implementation="linaer"), "did you mean 'linear'"),
        (
            lambda q, k, v: flow(q, k, v, is_causal=True, query_mask=torch.ones(1, 9).bool()),
            "give mask",
        ),
        (
            lambda q, k, v: flow(q, k[:, :, 1:], v[:, :, 1:], cu_seqlens=torch.tensor([0, 9])),
            "one key for each query",
        ),
    ],
)
def test_errors_say_what_to_do(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(*(torch.randn(1, 2, 9, 4) for _ in range(3)))


def test_parallel_is_the_same_function() -> None:
    tensors = [t.detach() for t in draw(3)]
    for is_causal in (False, True):
        out = flow(*tensors, is_causal=is_causal, implementation="parallel")
        assert_close(out, flow(*tensors, is_causal=is_causal), 1e-9)


def test_layer_reads_a_context_of_another_width() -> None:
    config = FlowConfig(
        embed_dim=24, num_heads=4, num_kv_heads=2, is_causal=False, inner_dim=32, out_dim=10,
        context_dim=7,
    )  # fmt: skip
    layer = FlowAttention(config).double()
    x, context = torch.randn(3, 9, 24).double(), torch.randn(3, 13, 7).double()
    out = layer(x, context=context)
    assert out.shape == (3, 9, 10)
    mask, context_mask = torch.rand(3, 9) > 0.3, torch.rand(3, 13) > 0.3
    mask[:, 0] = context_mask[:, 0] = True
    padded = layer(x, context=context, mask=mask, context_mask=context_mask)
    for row in range(3):
        alone = layer(
            x[row : row + 1, mask[row]], context=context[row : row + 1, context_mask[row]]
        )
        assert_close(padded[row : row + 1, mask[row]], alone, 1e-9)
    values = torch.randn(3, 13, 7).double()
    assert not torch.allclose(layer(x, context=context, context_values=values), out)


def test_a_context_of_the_same_length_is_no_self_attention() -> None:
    """Its padding is not that of the sinks."""
    layer = FlowAttention(FlowConfig(embed_dim=24, num_heads=4, is_causal=False)).double()
    x, context = torch.randn(2, 1, 9, 24).double()
    context_mask = torch.ones(1, 9, dtype=torch.bool)
    context_mask[:, 5:] = False
    out = layer(x, context=context, context_mask=context_mask)
    assert_close(out, layer(x, context=context[:, :5]), 1e-9)


def test_layer_errors_say_what_to_do() -> None:
    causal = FlowAttention(FlowConfig(embed_dim=24, num_heads=4))
    x = torch.randn(1, 9, 24)
    with pytest.raises(ValueError, match="one key for each query"):
        causal(x, context=torch.randn(1, 8, 24))
    with pytest.raises(ValueError, match="give mask alone"):
        causal(x, context=x, context_mask=torch.ones(1, 9).bool())
    both = FlowAttention(FlowConfig(embed_dim=24, num_heads=4, is_causal=False))
    with pytest.raises(ValueError, match="no streaming form"):
        both.init_state(1)
    with pytest.raises(ValueError, match="need a context"):
        both(x, context_mask=torch.ones(1, 9).bool())
    with pytest.raises(ValueError, match="cu_seqlens is for self-attention"):
        both(x, context=x, cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="not a multiple of num_heads 5"):
        FlowConfig(embed_dim=24, num_heads=5)
    with pytest.raises(ValueError, match="unknown kernel"):
        FlowConfig(embed_dim=24, num_heads=4, kernel="exp")


def test_dropout_is_on_the_output_while_training() -> None:
    layer = FlowAttention(FlowConfig(embed_dim=24, num_heads=4, dropout=0.5))
    x = torch.randn(1, 63, 24)
    assert 0.3 < (layer(x) == 0).float().mean() < 0.7
    assert (layer.eval()(x) != 0).all()
