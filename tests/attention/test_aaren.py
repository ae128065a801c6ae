"""Aaren beyond the contract: merging states, forms, extremes, gradients, memory, cost."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_close, relative_error
from manyheads.attention import (
    AarenAttention,
    AarenConfig,
    AarenState,
    aaren,
    aaren_reference,
    aaren_step,
    aaren_update,
    aaren_weights,
    combine,
    many_to_one,
    prefix_attention,
    prefix_states,
)
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import largest_tensor_numel, peak_memory
from manyheads.layers.state import state_bytes
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.registry import Shape, get_mechanism

FORMS = ("chunked", "recurrent", "scan")


def draw(batch=1, heads=3, length=63, dim=20, strength=1.0) -> tuple[Tensor, Tensor]:
    scores = torch.randn(batch, heads, length).double() * strength
    return scores, torch.randn(batch, heads, length, dim).double()


def brute_force(scores: Tensor, values: Tensor) -> Tensor:
    """Each prefix by its own softmax."""
    outputs = [
        (scores[..., :k].softmax(-1)[..., None] * values[..., :k, :]).sum(-2)
        for k in range(1, scores.shape[-1] + 1)
    ]
    return torch.stack(outputs, -2)


def leaf(scores: Tensor, values: Tensor) -> AarenState:
    return AarenState(scores, torch.ones_like(scores), values)


def assert_states_close(a: AarenState, b: AarenState, limit: float = 1e-12) -> None:
    """Equal up to a factor e^c of u and w that m takes up."""
    assert torch.equal(a.m, b.m)
    torch.testing.assert_close(a.u, b.u, rtol=limit, atol=limit)
    torch.testing.assert_close(a.w, b.w, rtol=limit, atol=limit)


@settings(max_examples=40, deadline=None)
@given(
    strength=st.sampled_from([0.0, 1.0, 150.0]),
    empty=st.sets(st.integers(0, 6)),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_combine_is_associative_and_commutative(strength, empty, seed, data) -> None:
    """Any order and any bracketing of seven leaves, some of them empty, give one state."""
    torch.manual_seed(seed)
    scores, values = draw(batch=2, length=7, dim=5, strength=strength)
    states = [leaf(scores[..., i], values[..., i, :]) for i in range(7)]
    for i in empty:
        zero = torch.zeros_like(states[i].u)
        states[i] = AarenState(zero - torch.inf, zero, zero[..., None].expand_as(states[i].w))
    expected = states[0]
    for state in states[1:]:
        expected = combine(expected, state)
    pool = data.draw(st.permutations(states))
    while len(pool) > 1:
        at = data.draw(st.integers(0, len(pool) - 2))
        pool[at : at + 2] = [combine(pool[at], pool[at + 1])]
    assert_states_close(pool[0], expected)
    assert torch.isfinite(expected.output).all()
    if len(empty) == 7:
        assert (expected.output == 0).all()


def test_the_empty_state_is_the_identity() -> None:
    scores, values = draw(batch=2, length=1, dim=5)
    some = leaf(scores[..., 0], values[..., 0, :])
    module = AarenAttention(AarenConfig(embed_dim=15, num_heads=3)).double()
    empty = module.init_state(2)
    for merged in (combine(empty, some), combine(some, empty)):
        assert all(torch.equal(a, b) for a, b in zip(merged, some, strict=True))
    nothing = combine(empty, empty)
    assert (nothing.m == -torch.inf).all()
    assert (nothing.output == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 150),
    chunk_size=st.sampled_from([1, 7, 16, 32, 64, 100]),
    strength=st.sampled_from([0.0, 1.0, 150.0]),
    form=st.sampled_from(FORMS),
)
def test_all_forms_equal_each_prefix_softmax(length, chunk_size, strength, form) -> None:
    torch.manual_seed(length)
    scores, values = draw(batch=2, length=length, dim=5, strength=strength)
    out, last = prefix_attention(scores, values, chunk_size=chunk_size, implementation=form)
    assert_close(out, brute_force(scores, values), 1e-11)
    states = prefix_states(scores, values, chunk_size=chunk_size)
    assert torch.equal(states.m, scores.cummax(-1).values)
    assert_close(states.output, out, 1e-12)
    assert_states_close(last, AarenState(states.m[..., -1], states.u[..., -1], states.w[:, :, -1]))


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 63), max_size=5),
    form=st.sampled_from(FORMS),
    seed=st.integers(0, 1000),
)
def test_any_split_with_any_mask(cuts, form, seed) -> None:
    """Blocks joined by their states equal one call, whatever is padded, up to whole rows."""
    torch.manual_seed(seed)
    scores, values = draw(batch=3, strength=30.0)
    mask = torch.rand(3, 63) < torch.tensor([[0.1], [0.7], [0.0]])
    whole, last = prefix_attention(scores, values, mask=mask)
    state, parts = None, []
    for a, b in pairwise([0, *sorted(cuts), 63]):
        out, state = prefix_attention(
            scores[..., a:b],
            values[:, :, a:b],
            state=state,
            mask=mask[:, a:b],
            chunk_size=16,
            implementation=form,
        )
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=0, atol=1e-11)
    assert_states_close(state, last, 1e-11)
    assert (whole[2] == 0).all()
    assert (last.m[2] == -torch.inf).all()


def test_padding_passes_the_state_through() -> None:
    scores, values = draw(batch=1, length=10)
    mask = torch.ones(1, 10, dtype=torch.bool)
    mask[:, :2] = mask[:, 5:7] = False
    scores[:, :, ~mask[0]] = torch.nan  # what stands under padding is never read
    values[:, :, ~mask[0]] = torch.nan
    out, _ = prefix_attention(scores, values, mask=mask)
    real, _ = prefix_attention(scores[..., mask[0]], values[:, :, mask[0]])
    assert (out[:, :, :2] == 0).all()
    assert_close(out[:, :, mask[0]], real, 1e-12)
    assert torch.equal(out[:, :, 5], out[:, :, 4])
    assert torch.equal(out[:, :, 6], out[:, :, 4])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_scores_of_hundreds_are_exact_in_float32(form, order) -> None:
    """±450: sums of exponentials over- and underflow by hundreds of powers of ten."""
    scores = torch.linspace(-450, 450, 301).expand(1, 2, -1)
    if order != "rising":
        scores = scores.flip(-1)
    if order == "mixed":
        scores = scores[..., torch.randperm(301)]
    values = torch.randn(1, 2, 301, 20)
    leaves = [scores.clone().requires_grad_(), values.requires_grad_()]
    out, state = prefix_attention(*leaves, implementation=form)
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad((out * cotangent).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = brute_force(*wide)
    expected_grads = torch.autograd.grad((expected * cotangent).sum(), wide)
    assert_close(out, expected, 3e-7)
    assert_close(state.output, expected[:, :, -1], 3e-7)
    # The score's gradient is a difference of two sums over later tokens, here almost equal: it is
    # as exact as float32 sums of that size are.
    size = (cotangent @ values.mT).abs().sum(-2).max().item()
    torch.testing.assert_close(grads[0].double(), expected_grads[0], rtol=0, atol=1.2e-7 * size)
    assert_close(grads[1], expected_grads[1], 1e-6)


@pytest.mark.parametrize("size", [0.0, 1e30, 3e38])
def test_no_score_makes_a_nan(size) -> None:
    scores = (torch.randint(-1, 2, (2, 3, 63)) * size).requires_grad_()
    values = torch.randn(2, 3, 63, 20, requires_grad=True)
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[0, :40] = False
    for form in FORMS:
        out, state = prefix_attention(scores, values, mask=mask, implementation=form)
        total = out.square().sum() + state.w.square().sum() + state.u.sum()
        for t in (out, *torch.autograd.grad(total, (scores, values))):
            assert torch.isfinite(t).all()


def test_a_score_of_minus_infinity_is_a_token_that_is_not_there() -> None:
    scores, values = draw(batch=1, length=20)
    scores[:, 0, 3:9] = -torch.inf  # for one head only
    out, _ = prefix_attention(scores, values)
    keep = [*range(3), *range(9, 20)]
    other, _ = prefix_attention(scores[:, :1, keep], values[:, :1, keep])
    assert_close(out[:, :1, keep], other, 1e-12)
    assert_close(out[:, 1:], prefix_attention(scores[:, 1:], values[:, 1:])[0], 1e-12)


@pytest.mark.parametrize(("batch", "length", "chunk"), [(3, 63, 16), (1, 130, 32), (2, 31, 64)])
def test_every_gradient_of_outputs_and_states(batch, length, chunk) -> None:
    """Scores, values, and the u and w of the first state, through two blocks or one."""
    scores, values = draw(batch=batch, length=length, strength=4.0)
    scores[0, :, : length // 3] = -torch.inf
    state = (torch.randn(batch, 3), torch.rand(batch, 3) + 0.5, torch.randn(batch, 3, 20))
    m, u, w = (t.double() for t in state)
    leaves = [t.requires_grad_() for t in (scores, values, u, w)]
    cotangent = torch.randn_like(values)
    ends = torch.randn_like(u), torch.randn_like(w)
    results = []
    for form, cut in (("scan", 0), ("chunked", 0), ("chunked", 7)):
        own, parts = AarenState(m, u, w), []
        for a, b in ((0, cut), (cut, length)):
            block = scores[..., a:b], values[:, :, a:b]
            out, own = prefix_attention(*block, state=own, chunk_size=chunk, implementation=form)
            parts.append(out)
        total = (torch.cat(parts, 2) * cotangent).sum()
        total = total + (own.u * ends[0]).sum() + (own.w * ends[1]).sum()
        results.append(torch.autograd.grad(total, leaves))
    for other in results[1:]:
        for name, a, b in zip(("s", "v", "u", "w"), other, results[0], strict=True):
            assert_close(a, b, 1e-11, name)


def test_closed_form_gradients_are_numerically_right() -> None:
    scores, values = draw(heads=2, length=9, dim=2)
    leaves = [scores.requires_grad_(), values.requires_grad_()]
    assert torch.autograd.gradcheck(
        lambda s, v: prefix_attention(s, v, chunk_size=4, implementation="chunked")[0], leaves
    )
    assert torch.autograd.gradgradcheck(
        lambda s, v: prefix_attention(s, v, implementation="scan")[0], leaves
    )


def test_gradients_against_the_reference_through_the_query() -> None:
    """Odd sizes, grouped heads, a query for each row, padding on both sides."""
    query = torch.randn(3, 4, 20).double().requires_grad_()
    key = torch.randn(3, 2, 63, 20).double().requires_grad_()
    value = torch.randn(3, 2, 63, 7).double().requires_grad_()
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[0, :11] = mask[1, -9:] = mask[2, 20:30] = False
    cotangent = torch.randn(3, 4, 63, 7).double()
    results = []
    for fn in (aaren, aaren_reference):
        out = fn(query, key, value, scale=0.7, mask=mask)
        grads = torch.autograd.grad((out * cotangent).sum(), (query, key, value))
        results.append((out, *grads))
    for name, a, b in zip(("out", "q", "k", "v"), *results, strict=True):
        assert_close(a, b, 1e-11, name)


def test_weights_are_the_implied_attention() -> None:
    query, key, value = torch.randn(3, 20), torch.randn(2, 3, 63, 20), torch.randn(2, 3, 63, 20)
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[0, :5] = False
    weights = aaren_weights(query.double(), key.double(), mask=mask)
    out = aaren(query.double(), key.double(), value.double(), mask=mask)
    assert_close(weights @ value.double(), out, 1e-12)
    rows = weights.sum(-1)
    assert_close(rows, mask[:, None].expand_as(rows).double(), 1e-12)


@settings(max_examples=20, deadline=None)
@given(block_size=st.integers(1, 80), seed=st.integers(0, 100), cut=st.integers(0, 63))
def test_many_to_one_reads_any_blocks(block_size, seed, cut) -> None:
    torch.manual_seed(seed)
    query = torch.randn(4, 20).double()
    key, value = (torch.randn(3, 2, 63, d).double() for d in (20, 7))
    mask = torch.rand(3, 63) < 0.8
    mask[:, -1] = True
    out, state = many_to_one(query, key, value, mask=mask, block_size=block_size)
    assert_close(out, aaren(query, key, value, mask=mask)[:, :, -1], 1e-11)
    _, first = many_to_one(query, key[:, :, :cut], value[:, :, :cut], mask=mask[:, :cut])
    _, second = many_to_one(query, key[:, :, cut:], value[:, :, cut:], mask=mask[:, cut:])
    assert_states_close(combine(second, first), state, 1e-11)  # shards in any order


def test_many_to_one_needs_the_memory_of_a_block() -> None:
    query, key = torch.randn(2, 16), torch.randn(1, 2, 4096, 16)
    small, large = (
        peak_memory(many_to_one, query, key[:, :, :n], key[:, :, :n], block_size=64).peak_bytes
        for n in (256, 4096)
    )
    assert small == large


def test_streaming_state_never_grows() -> None:
    """Bytes after 10 and after 10,000 tokens are equal, by steps and by blocks."""
    query = torch.randn(8, 64)
    sizes = []
    for length in (10, 10_000):
        key = torch.randn(1, 8, length, 64)
        _, state = aaren_update(None, query, key, key)
        sizes.append(state_bytes(state))
        for t in range(10):
            _, state = aaren_step(state, query, key[:, :, t], key[:, :, t])
        sizes.append(state_bytes(state))
    assert set(sizes) == {4 * 8 * (64 + 2)}


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_quadratic_is_made(backward) -> None:
    heads, length, dim = 2, 4096, 16

    def run() -> None:
        query = torch.randn(heads, dim, requires_grad=backward)
        key, value = (torch.randn(1, heads, length, dim, requires_grad=backward) for _ in range(2))
        out = aaren(query, key, value)
        if backward:
            out.sum().backward()

    assert largest_tensor_numel(run) < heads * length * length / 16
    if not backward:
        shape = Shape(heads=heads, length=length, head_dim=dim)
        stated = get_mechanism("aaren").memory_numbers(shape)
        inputs = torch.randn(heads, dim), *torch.randn(2, 1, heads, length, dim)
        assert 0.8 < peak_memory(aaren, *inputs).peak_bytes / (4 * stated) < 1.5


@pytest.mark.parametrize(
    "shape",
    [
        Shape(length=1000),
        Shape(batch=3, heads=5, length=63, head_dim=20),
        Shape(heads=2, length=9000, head_dim=16),
        Shape(heads=8, kv_heads=2, length=100, head_dim=20, value_dim=24),
    ],
)
def test_flops_are_the_closed_form(shape) -> None:
    m = get_mechanism("aaren")
    assert count_flops(lambda: aaren(**m.inputs(shape))).total == m.flops(shape)


def test_a_long_row_is_cut_into_pieces() -> None:
    """Longer than a piece, and more rows than a piece holds."""
    for sizes in ((1, 1, 20_001), (40, 8, 130)):
        scores, values = torch.randn(*sizes).double() * 5, torch.randn(*sizes, 2).double()
        expected, _ = prefix_attention(scores, values, implementation="scan")
        assert_close(prefix_attention(scores, values)[0], expected, 1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("query", ["token", "per_head", "shared"])
def test_module_is_multi_head_attention_on_every_prefix(query, bias) -> None:
    """The fused scores equal keys made and multiplied, as torch's own module does."""
    config = AarenConfig(embed_dim=60, num_heads=3, query=query, bias=bias)
    module = AarenAttention(config).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 60).double()
    token = module.query
    if query == "token":
        other = torch.nn.MultiheadAttention(60, 3, bias=bias, batch_first=True).double()
        weights = {k: t for k, t in module.to_official().items() if k != "query"}
        other.load_state_dict(weights)
        expected = [
            other(token.expand(2, 1, -1), x[:, :k], x[:, :k])[0][:, 0] for k in range(1, 10)
        ]
        assert_close(module(x), torch.stack(expected, 1), 1e-12)
        return
    heads = token if query == "per_head" else token.expand(3, -1)
    keys, values = (
        p(x).unflatten(-1, (3, -1)).transpose(1, 2) for p in (module.k_proj, module.v_proj)
    )
    out = aaren_reference(heads, keys, values).transpose(1, 2).flatten(-2)
    assert_close(module(x), module.out_proj(out), 1e-12)


def test_module_state_is_that_of_the_prefix() -> None:
    module = AarenAttention(AarenConfig(embed_dim=60, num_heads=3)).double().eval()
    x = torch.randn(3, 20, 60).double()
    _, bulk = module.update(x, module.init_state(3))
    state = module.init_state(3)
    for t in range(20):
        _, state = module.step(x[:, t], state)
    assert_states_close(state, bulk, 1e-11)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_function_compiles_whole(backend) -> None:
    query = torch.randn(3, 20, requires_grad=True)
    key, value = (torch.randn(2, 3, 63, 20, requires_grad=True) for _ in range(2))
    compiled = torch.compile(aaren, fullgraph=True, backend=backend)
    results = []
    for fn in (aaren, compiled):
        out = fn(query, key, value)
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    for a, b in zip(*results, strict=True):
        assert_close(b, a, 1e-5)


def test_half_precision_is_scanned_in_float32() -> None:
    scores = torch.randn(1, 2, 4000).half()
    values = torch.randn(1, 2, 4000, 8).half()
    out, state = prefix_attention(scores, values)
    assert out.dtype == torch.float16
    assert state.u.dtype == state.w.dtype == torch.float32
    exact, _ = prefix_attention(scores.double(), values.double())
    assert relative_error(out, exact) < 5e-4


def test_autocast_does_not_reach_the_sums() -> None:
    query, (scores, values) = torch.randn(3, 20), (t.float() for t in draw(length=500))
    key = torch.randn(1, 3, 500, 20)
    module = AarenAttention(AarenConfig(embed_dim=60, num_heads=3))
    x = torch.randn(1, 500, 60)

    def run() -> list[Tensor]:
        out, state = prefix_attention(scores, values)
        return [out, *state, aaren(query, key, values), *many_to_one(query, key, values)[1]]

    expected = run()
    _, state = module.update(x, module.init_state(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)
        _, own = module.update(x, module.init_state(1))
    assert_close(own.m, state.m, 1e-6)
    assert_close(own.u, state.u, 1e-5)


def test_errors_name_what_is_wrong() -> None:
    query, key = torch.randn(3, 20), torch.randn(2, 3, 63, 20)
    with pytest.raises(ValueError, match=r"head_dim.*20 and 21"):
        aaren(query, torch.randn(2, 3, 63, 21), key)
    with pytest.raises(ValueError, match="one query a head"):
        aaren(key, key, key)
    with pytest.raises(ValueError, match="batch of query and key differ: 3 and 2"):
        aaren(torch.randn(3, 3, 20), key, key)
    with pytest.raises(ValueError, match="4 query heads"):
        aaren(torch.randn(4, 20), key, key)
    with pytest.raises(ValueError, match=r"implementation 'chunk'.*chunked"):
        aaren(query, key, key, implementation="chunk")
    with pytest.raises(ValueError, match="block_size 0"):
        many_to_one(query, key, key, block_size=0)
    with pytest.raises(ValueError, match="length of scores and value differ: 62 and 63"):
        prefix_attention(torch.randn(2, 3, 62), key)
    with pytest.raises(ValueError, match="not both"):
        aaren(
            query, key[:1], key[:1],
            mask=torch.ones(1, 63, dtype=torch.bool), cu_seqlens=torch.tensor([0, 63]),
        )  # fmt: skip
    with pytest.raises(ValueError, match="no bidirectional form"):
        AarenConfig(embed_dim=60, num_heads=3, is_causal=False)
    with pytest.raises(ValueError, match="query 'tokens'"):
        AarenConfig(embed_dim=60, num_heads=3, query="tokens")
    with pytest.raises(ValueError, match="not a multiple of num_heads 7"):
        AarenConfig(embed_dim=60, num_heads=7)


def test_vectors_are_kept_while_the_weights_stay(monkeypatch) -> None:
    layer = AarenAttention(AarenConfig(embed_dim=24, num_heads=3, bias=True)).eval()
    made: list[torch.dtype] = []
    real = layer._vectors
    monkeypatch.setattr(layer, "_vectors", lambda dtype: made.append(dtype) or real(dtype))
    x = torch.randn(2, 5, 24)
    wanted = layer(x)  # with gradients: made anew
    with torch.no_grad():
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x), wanted)
        assert len(made) == 2
        for parameter in (layer.query, layer.q_proj.weight, layer.q_proj.bias, layer.k_proj.weight):
            parameter.add_(0.5)
            with torch.enable_grad():
                wanted = layer(x)
            before = len(made)
            assert torch.equal(layer(x), wanted)
            assert len(made) == before + 1
        again = copy.deepcopy(layer)
        assert torch.equal(again(x), wanted)
        layer.load_state_dict({k: 0.5 * v for k, v in layer.state_dict().items()})
        assert not torch.allclose(layer(x), wanted)
        assert torch.equal(again(x), wanted)
        layer.train()
        before = len(made)
        layer(x)
        layer(x)
        assert len(made) == before + 2


def test_vectors_of_shared_matrices_are_not_kept() -> None:
    torch.manual_seed(0)
    config = MixerLMConfig(
        embed_dim=24, num_heads=3, mixers="aaren*3",
        sharing={"atoms": 2, "projections": ["query"]},
    )  # fmt: skip
    model, tokens = MixerLM(config).eval(), torch.randint(256, (2, 9))
    with torch.no_grad():
        before = model(tokens)
        for name, atoms in model.named_parameters():
            if "atoms" in name:
                atoms.mul_(-50)
        after = model(tokens)
        assert not torch.allclose(before, after)
