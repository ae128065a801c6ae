"""NormAttention beyond the contract: forms, the norm's gradient, states, precision, memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compare import assert_close, relative_error
from manyheads.attention import (
    NormAttention,
    NormConfig,
    norm,
    norm_reference,
    norm_step,
    norm_update,
    norm_weights,
)
from manyheads.attention.norm import NormState
from manyheads.choose.memory import largest_tensor_numel, peak_memory


def draw(batch=1, heads=3, kv_heads=3, length=63, dim=20, value=12):
    q = torch.randn(batch, heads, length, dim).double()
    k = torch.randn(batch, kv_heads, length, dim).double()
    return q, k, torch.randn(batch, kv_heads, length, value).double()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 150),
    chunk_size=st.sampled_from([1, 7, 16, 64, 100]),
    implementation=st.sampled_from(["chunked", "recurrent", "parallel"]),
    is_causal=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    eps=st.sampled_from([1e-8, 1e-2, 3.0]),
    normalize=st.booleans(),
)
def test_all_forms_agree(
    length, chunk_size, implementation, is_causal, groups, eps, normalize
) -> None:
    if implementation == "recurrent":
        is_causal = True
    torch.manual_seed(length)
    q, k, v = draw(batch=2, heads=4, kv_heads=4 // groups, length=length)
    mask = torch.rand(2, length) < 0.8
    options = {"is_causal": is_causal, "mask": mask, "eps": eps, "normalize": normalize}
    out = norm(q, k, v, chunk_size=chunk_size, implementation=implementation, **options)
    expected = norm_reference(q, k, v, **options)
    assert torch.isfinite(out).all()
    assert (out - expected).abs().max() <= 1e-9 * expected.abs().max().clamp_min(1)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_split_of_padded_rows_equals_one_call(data) -> None:
    """Rows of different real lengths, cut anywhere, in blocks and steps; gradients too."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    length = data.draw(st.integers(2, 80))
    leaves = [t.requires_grad_() for t in draw(batch=3, heads=4, kv_heads=2, length=length)]
    mask = torch.rand(3, length) < data.draw(st.sampled_from([0.3, 0.9]))
    borders = [0, *sorted(data.draw(st.lists(st.integers(1, length - 1), max_size=4))), length]
    state, parts = None, []
    for a, b in pairwise(borders):
        block = [t[:, :, a:b] for t in leaves]
        out, state = norm_update(state, *block, mask=mask[:, a:b])
        parts.append(out)
    whole, final = norm_update(None, *leaves, mask=mask)
    split = torch.cat(parts, 2)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.memory, final.memory, rtol=1e-9, atol=1e-9)
    cotangent, last = torch.randn_like(whole), torch.randn_like(final.memory)
    grads = [
        torch.autograd.grad((o * cotangent).sum() + (s.memory * last).sum(), leaves)
        for o, s in ((split, state), (whole, final))
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda x: sum(x) > 0),
    is_causal=st.booleans(),
)
def test_packed_sequences_are_alone(lengths, is_causal) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = draw(length=int(borders[-1]))
    packed = norm(q, k, v, is_causal=is_causal, cu_seqlens=borders)
    for a, b in pairwise(borders.tolist()):
        alone = norm(*(t[:, :, a:b] for t in (q, k, v)), is_causal=is_causal)
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_closed_form_gradients_are_numerically_right(is_causal, eps) -> None:
    leaves = [t.requires_grad_() for t in draw(heads=2, kv_heads=2, length=7, dim=3, value=2)]
    assert torch.autograd.gradcheck(
        lambda *t: norm(*t, is_causal=is_causal, eps=eps, chunk_size=4), leaves
    )


def test_weights_are_the_implied_attention() -> None:
    q, k, v = draw()
    for is_causal in (True, False):
        weights = norm_weights(q, k, v, is_causal=is_causal)
        assert_close(weights @ v, norm(q, k, v, is_causal=is_causal), 1e-9)
        assert not is_causal or (weights.triu(1) == 0).all()


def test_the_norm_couples_the_heads() -> None:
    q, k, v = draw(batch=3)
    out = norm(q, k, v)
    assert_close(out.square().mean((1, 3)), torch.ones(3, 63).double(), 1e-6)
    louder = v.clone()
    louder[:, 0] *= 10
    other = norm(q, k, louder)
    assert relative_error(other[:, 1:], out[:, 1:]) > 0.5
    plain, loud = norm(q, k, v, normalize=False), norm(q, k, louder, normalize=False)
    assert torch.equal(plain[:, 1:], loud[:, 1:])


def test_scale_acts_through_eps_alone() -> None:
    q, k, v = draw()
    assert_close(norm(q, k, v, scale=0.01), norm(q, k, v), 1e-6)
    assert relative_error(norm(q, k, v, scale=0.01, eps=1.0), norm(q, k, v, eps=1.0)) > 0.1


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_an_all_zero_row_gives_zero_and_the_slope_one_over_eps(is_causal, eps) -> None:
    """What relu or a zero token leaves: no NaN, and the norm's subgradient at 0 is 0."""
    q, k, v = (t.float() for t in draw())
    q[:, :, 5] = 0
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = norm(*leaves, is_causal=is_causal, eps=eps)
    assert (out[:, :, 5] == 0).all()
    grads = torch.autograd.grad(out[:, :, 5].sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)
    past = slice(0, 6) if is_causal else slice(None)
    memory = (k[:, :, past].mT @ v[:, :, past]).detach()
    assert_close(grads[0][:, :, 5], memory.sum(-1) / eps, 1e-5)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e15])
@pytest.mark.parametrize("eps", [1e-8, 3.0])
def test_tiny_and_huge_values_keep_finite_gradients(size, eps) -> None:
    q, k, v = (t.float() for t in draw())
    for is_causal in (True, False):
        leaves = [q.clone().requires_grad_(), k, (v * size).requires_grad_()]
        out = norm(*leaves, is_causal=is_causal, eps=eps)
        assert torch.isfinite(out).all()
        for grad in torch.autograd.grad(out.square().sum(), (leaves[0], leaves[2])):
            assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_long_sums_of_positive_features_do_not_overflow(dtype, is_causal) -> None:
    """In float16 the plain sum of 8,192 tokens exceeds 65,504; here it is held in float32."""
    q, k = ((1 + F.elu(torch.randn(1, 2, 8192, 16))).to(dtype) for _ in range(2))
    v = (torch.rand(1, 2, 8192, 16) * 4).to(dtype)
    out = norm(q, k, v, is_causal=is_causal)
    exact = norm(q.double(), k.double(), v.double(), is_causal=is_causal)
    sums = norm(q.double(), k.double(), v.double(), is_causal=is_causal, normalize=False)
    assert sums.abs().max() > torch.finfo(torch.float16).max
    assert out.dtype == dtype
    assert_close(out, exact, 1e-3 if dtype == torch.float16 else 5e-3)
    _, state = norm_update(None, q, k, v)
    assert state.memory.dtype == torch.float32


def test_eps_bounds_the_gradient_of_weak_similarities() -> None:
    """S = s S0: d/dS grows as 1/s without a bound at eps 1e-8, and saturates at eps 1e-2."""
    steep = {}
    for eps in (1e-8, 1e-2):
        for s in (1e-5, 1e-7):
            torch.manual_seed(0)
            q, k, v = (torch.rand(1, 1, 32, 8).double() for _ in range(3))
            q = (q * s).requires_grad_()
            out = norm(q, k, v, eps=eps)
            steep[eps, s] = torch.autograd.grad((out * torch.randn_like(out)).sum(), q)[0].norm()
    assert 90 < steep[1e-8, 1e-7] / steep[1e-8, 1e-5] < 110
    assert 0.9 < steep[1e-2, 1e-7] / steep[1e-2, 1e-5] < 1.2
    assert steep[1e-2, 1e-7] < 1e-2 * steep[1e-8, 1e-7]


@pytest.mark.parametrize("is_causal", [True, False])
def test_memory_is_linear_and_nothing_is_quadratic(is_causal) -> None:
    peaks = []
    for length in (1024, 2048):
        leaves = [torch.randn(1, 8, length, 32, requires_grad=True) for _ in range(3)]

        def run(leaves=leaves):
            norm(*leaves, is_causal=is_causal).square().sum().backward()

        assert largest_tensor_numel(run) < 2 * leaves[0].numel() + (1 << 18)
        peaks.append(peak_memory(run).peak_bytes)
    assert peaks[1] < 2.2 * peaks[0]


def test_step_does_not_change_its_state() -> None:
    q, k, v = draw(heads=4, kv_heads=2)
    _, state = norm_update(None, q, k, v)
    assert state.memory.shape == (1, 2, 20, 12)
    before = state.memory.clone()
    norm_step(state, *(t[:, :, 0] for t in (q, k, v)))
    assert torch.equal(state.memory, before)


def test_function_compiles_with_a_mask() -> None:
    q, k, v = (t.float().requires_grad_() for t in draw(batch=2))
    mask = torch.rand(2, 63) < 0.7
    for is_causal in (True, False):

        def run(q, k, v, mask, is_causal=is_causal):
            return norm(q, k, v, is_causal=is_causal, mask=mask)

        out = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v, mask)
        expected = run(q, k, v, mask)
        assert_close(out, expected, 1e-5)
        for a, b in zip(
            torch.autograd.grad(out.square().mean() + out[0, 0, 0, 0], (q, k, v)),
            torch.autograd.grad(expected.square().mean() + expected[0, 0, 0, 0], (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


OPTIONS = [
    {"variant": "t1"},
    {"variant": "t2"},
    {"lrpe": False},
    {"learned_angles": False, "householder": False},
    {"feature_map": "relu"},
    {"eps": 1e-2},
    {"norm": "layer", "layout": "lra"},
    {"norm": "batch", "layout": "lra"},
    {"num_heads": 8},  # five channels a head: the last is not turned
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_layer(options) -> None:
    options = {"num_heads": 4} | options
    layer = NormAttention(NormConfig(embed_dim=40, **options)).double()
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
    other = NormAttention(NormConfig(embed_dim=40, **options)).double().eval()
    assert_close(other.load_official(layer.to_official())(x), layer(x), 1e-12)


def test_the_layer_is_the_papers_formula() -> None:
    """Activation before the rotation, no scale, the norm over all heads, then the projection."""
    layer = NormAttention(NormConfig(embed_dim=24, num_heads=3, is_causal=False, variant="t1"))
    x = torch.randn(2, 13, 24)
    q, k = (F.elu(p(x)).unflatten(-1, (3, 8)) for p in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).unflatten(-1, (3, 8))
    householder = torch.eye(8) - 2 * torch.outer(layer.lrpe.v, layer.lrpe.v)
    angle = torch.arange(13)[:, None] * layer.lrpe.theta.flatten()
    pairs = torch.polar(torch.ones_like(angle), angle)[None, :, None]

    def turn(t):
        z = torch.view_as_complex((t @ householder).unflatten(-1, (4, 2)).contiguous())
        return torch.view_as_real(z * pairs).flatten(-2)

    o = torch.einsum("bihd,bjhd,bjhe->bihe", turn(q), turn(k), v).flatten(-2)
    o = o / (o.norm(dim=-1, keepdim=True) / 24**0.5 + 1e-8)
    assert_close(layer(x), layer.out_proj(o), 1e-5)


def test_initial_weights_follow_the_paper() -> None:
    layer = NormAttention(NormConfig(embed_dim=256))
    bound = (6 / 512) ** 0.5
    for name, gain in (("q", 0.5**0.5), ("k", 0.5**0.5), ("v", 0.5**0.5), ("out", 1.0)):
        weight = layer.get_parameter(f"{name}_proj.weight")
        assert 0.98 * gain * bound < weight.abs().max() <= gain * bound
    assert (layer.out_proj.bias == 0).all()
    assert not layer.lrpe.v.requires_grad
    assert abs(float(layer.lrpe.v.norm()) - 1) < 1e-5


def test_half_precision_layers_stay_finite_on_long_input() -> None:
    x = torch.randn(1, 4096, 32)
    for name in ("simplerms", "layer"):
        layer = NormAttention(NormConfig(embed_dim=32, num_heads=2, norm=name)).half()
        y = layer(x.half())
        assert y.dtype == torch.float16
        assert torch.isfinite(y).all()
        state = layer.init_state(1)
        assert state.attention.memory.dtype == torch.float32


def test_errors_name_the_fix() -> None:
    q, k, v = draw()
    with pytest.raises(ValueError, match="is_causal=True"):
        norm(q, k, v, implementation="recurrent")
    with pytest.raises(ValueError, match="chunked"):
        norm(q, k, v, implementation="chunks")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_size 0"):
        norm(q, k, v, is_causal=True, chunk_size=0)
    with pytest.raises(ValueError, match="not both"):
        norm(q, k, v, mask=torch.ones(1, 63).bool(), cu_seqlens=torch.tensor([0, 63]))
    with pytest.raises(ValueError, match="num_heads 3"):
        NormConfig(embed_dim=40, num_heads=3)
    with pytest.raises(ValueError, match="t1"):
        NormConfig(embed_dim=40, variant="t3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="synbatch"):
        NormConfig(embed_dim=40, norm="syncbatch")
    with pytest.raises(ValueError, match="elu"):
        NormConfig(embed_dim=40, feature_map="elo")
    bidirectional = NormAttention(NormConfig(embed_dim=40, is_causal=False))
    with pytest.raises(ValueError, match="no streaming form"):
        bidirectional.init_state(1)
    with pytest.raises(ValueError, match="no streaming form"):
        bidirectional.step(torch.zeros(1, 40), NormState(q))  # type: ignore[arg-type]
