"""URPE attention: what the contract suite does not ask of every mechanism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compare import assert_close, relative_error
from manyheads.attention import (
    URPEAttention,
    URPEConfig,
    softmax_reference,
    urpe,
    urpe_from_lse,
    urpe_reference,
    urpe_step,
    urpe_update,
    urpe_weights,
)
from manyheads.attention.urpe import blocks as cut
from manyheads.attention.urpe.definition import expand_factor
from manyheads.choose.memory import track_memory

B, H, N, D, V = 3, 4, 63, 20, 12
KINDS = ["none", "table", "table1", "matrix", "matrix1", "batch", "batch1"]


def qkv(*, batch: int = B, queries: int = N, keys: int = N, dtype=torch.float64):
    q = torch.randn(batch, H, queries, D, dtype=dtype)
    k = torch.randn(batch, H, keys, D, dtype=dtype)
    return q, k, torch.randn(batch, H, keys, V, dtype=dtype)


def factor(kind: str, *, batch: int = B, queries: int = N, keys: int = N, dtype=torch.float64):
    shapes = {
        "table": (H, 2 * max(queries, keys) - 1),
        "table1": (1, 2 * max(queries, keys) + 5),  # longer than needed
        "matrix": (H, queries, keys),
        "matrix1": (1, queries, keys),
        "batch": (batch, H, queries, keys),
        "batch1": (batch, 1, queries, keys),
    }
    return None if kind == "none" else torch.randn(shapes[kind], dtype=dtype)


def value_and_grads(fn, tensors: list[Tensor | None]) -> list[Tensor]:
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = fn(*leaves)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
    return [
        out,
        *torch.autograd.grad((out * weights).sum(), [t for t in leaves if t is not None]),
    ]


def compare(fn, reference, tensors, limit: float = 1e-10) -> None:
    for i, (a, e) in enumerate(
        zip(value_and_grads(fn, tensors), value_and_grads(reference, tensors), strict=True)
    ):
        assert_close(a, e, limit, f"result {i}")


@pytest.fixture(params=[1 << 19, 70], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cut, "_NUMBERS", request.param)
    monkeypatch.setattr(cut, "_LEAST_ROWS", 4)
    return request.param


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    ("bias", "multiplier"),
    [(b, "table") for b in KINDS] + [("table", c) for c in KINDS] + [("batch1", "matrix1")],
)
def test_every_form_of_factors(blocks: int, bias: str, multiplier: str, is_causal: bool) -> None:
    tensors = [*qkv(), factor(bias), factor(multiplier)]

    def run(fn):
        return lambda q, k, v, b, c: fn(q, k, v, bias=b, multiplier=c, is_causal=is_causal)

    compare(run(urpe), run(urpe_reference), tensors)


@pytest.mark.parametrize("bias", ["none", "table", "matrix"])
def test_queries_and_keys_of_different_lengths(blocks: int, bias: str) -> None:
    sizes = {"queries": 17, "keys": 40}
    mask = torch.rand(B, 40) > 0.3
    tensors = [*qkv(**sizes), factor(bias, **sizes), factor("table", **sizes)]

    def run(fn):
        return lambda q, k, v, b, c: fn(
            q, k, v, bias=b, multiplier=c, mask=mask, count_padding=True, scale=0.3
        )

    compare(run(urpe), run(urpe_reference), tensors)
    with pytest.raises(ValueError, match="count_padding=True"):
        urpe(*tensors[:3], multiplier=tensors[4], mask=mask)


@pytest.mark.parametrize("implementation", ["blocked", "dense", "lse"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_implementations_agree(implementation, is_causal) -> None:
    """Signed multipliers included, of which lse subtracts the negative part."""
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :9] = mask[1, 30:41] = False
    tensors = [*qkv(), factor("table"), factor("table")]
    assert tensors[4].min() < 0

    def run(fn, **options):
        return lambda q, k, v, b, c: fn(
            q, k, v, bias=b, multiplier=c, is_causal=is_causal, mask=mask, **options
        )

    def reference(*args):
        return run(urpe_reference)(*args) * mask[:, None, :, None]

    compare(run(urpe, implementation=implementation), reference, tensors)


@pytest.mark.parametrize("implementation", ["blocked", "dense", "lse"])
def test_grouped_heads_and_no_factors(implementation) -> None:
    q, k, v = qkv()
    out = urpe(q, k[:, :2], v[:, :2], implementation=implementation)
    k2, v2 = (t[:, :2].repeat_interleave(2, 1) for t in (k, v))
    assert_close(out, softmax_reference(q, k2, v2), 1e-12)


def test_lse_through_another_kernel() -> None:
    """torch's own flash attention gives the log-sum-exp; C has both signs and zeros."""

    def flash(q, k, v, bias):
        # The kernel wants a finite bias and one value dim: -1e30 is as good as -inf here.
        bias = None if bias is None else bias.clamp_min(-1e30)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, attn_mask=bias, scale=1.0
        )

    q, k, _ = qkv(dtype=torch.float32)
    v = torch.randn_like(k)
    bias, c = (torch.randn(1, H, N, N) for _ in range(2))
    c[..., ::5] = 0
    out = urpe_from_lse(q * D**-0.5, k, v, bias, c, kernel=flash)
    expected = urpe_reference(*(t.double() for t in (q, k, v)), bias=bias, multiplier=c)
    assert_close(out, expected, 2e-6)


def test_multiplier_one_is_softmax_attention() -> None:
    q, k, v = qkv()
    bias = factor("table")
    ones = torch.ones(H, 2 * N - 1, dtype=torch.float64)
    expected = softmax_reference(q, k, v, attn_mask=expand_factor(bias, N, N))
    assert_close(urpe(q, k, v, bias=bias, multiplier=ones), expected, 1e-12)
    without = urpe(q, k, v, bias=bias)
    assert torch.equal(urpe(q, k, v, bias=bias, multiplier=ones), without), "x · 1 changes no bit"


def test_the_multiplier_is_never_renormalised() -> None:
    q, k, v = qkv()
    c = factor("table")
    out = urpe(q, k, v, multiplier=c)
    assert_close(urpe(q, k, v, multiplier=-3 * c), -3 * out, 1e-12)
    rows = urpe(q, k, torch.ones_like(v), multiplier=c)[..., 0]
    assert_close(rows, urpe_weights(q, k, multiplier=c).sum(-1), 1e-12)
    assert relative_error(rows, torch.ones_like(rows)) > 0.3


def test_places_of_a_constant_input() -> None:
    """A relative bias leaves equal tokens equal; a multiplier does not."""
    q, k, v = (t[:, :, :1].expand(-1, -1, N, -1) for t in qkv())

    def spread(**factors: Tensor) -> float:
        out = urpe(q, k, v, bias=3 * factor("table"), **factors)
        return float((out - out[:, :, :1]).abs().max())

    assert spread() <= 1e-12
    assert spread(multiplier=1 + factor("table")) > 1e-2


def test_causal_entries_above_the_diagonal_never_matter() -> None:
    q, k, v = qkv()
    for kind in ("table", "matrix"):
        bias, c = factor(kind), factor(kind)
        out = urpe(q, k, v, bias=bias, multiplier=c, is_causal=True)
        if kind == "table":
            bias[:, N:], c[:, N:] = 1e9, torch.nan
        else:
            above = torch.ones(N, N, dtype=torch.bool).triu(1)
            bias[:, above], c[:, above] = 1e9, 1e9
        changed = urpe(q, k, v, bias=bias, multiplier=c.nan_to_num(7), is_causal=True)
        assert torch.equal(changed, out)


@pytest.mark.parametrize("implementation", ["blocked", "dense", "lse"])
def test_rows_without_a_key_give_zero(implementation) -> None:
    tensors = [*qkv(batch=2), factor("matrix"), factor("matrix")]
    tensors[3][:, 5] = -torch.inf
    tensors[3][:, :, 11] = -torch.inf
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1] = False

    def run(q, k, v, b, c):
        return urpe(
            q, k, v, bias=b, multiplier=c, mask=mask, count_padding=True,
            implementation=implementation,
        )  # fmt: skip

    out, *grads = value_and_grads(run, tensors)
    assert (out[0, :, 5] == 0).all()
    assert (out[1] == 0).all()
    for grad in grads:
        assert torch.isfinite(grad).all()
    assert (grads[3][:, 5] == 0).all()
    assert (grads[3][:, :, 11] == 0).all()
    table = torch.full((H, 2 * N - 1), -torch.inf, dtype=torch.float64)
    assert (urpe(*tensors[:3], bias=table, implementation=implementation) == 0).all()


def test_invalid_numbers_are_not_hidden() -> None:
    q, k, v = qkv()
    q[0, 0, 3, 0] = torch.nan
    out = urpe(q, k, v, bias=factor("matrix"), mask=torch.ones(B, N, dtype=torch.bool))
    assert out[0, 0, 3].isnan().all()
    assert torch.isfinite(out[0, 0, 4]).all()


def test_padded_queries_as_in_official_code() -> None:
    """count_padding: distances by place, padded keys hidden, all queries answered."""
    q, k, v = qkv()
    bias, c = factor("table"), factor("table")
    mask = torch.rand(B, N) > 0.4
    out = urpe(q, k, v, bias=bias, multiplier=c, mask=mask, count_padding=True)
    scores = q @ k.mT * D**-0.5 + expand_factor(bias, N, N)
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    expected = (weights * expand_factor(c, N, N)) @ v
    assert_close(out, expected, 1e-12)
    assert (out.transpose(1, 2)[~mask] != 0).any()
    default = urpe(q, k, v, bias=bias, multiplier=c, mask=mask)
    assert (default.transpose(1, 2)[~mask] == 0).all()
    assert relative_error(default.transpose(1, 2)[mask], out.transpose(1, 2)[mask]) > 0.1


def test_masked_matrices_stay_where_they_are() -> None:
    tensors = [*qkv(), factor("matrix"), factor("matrix1")]
    mask = torch.rand(B, N) > 0.4

    def run(fn):
        return lambda q, k, v, b, c: (
            fn(q, k, v, bias=b, multiplier=c, mask=mask, is_causal=True) * mask[:, None, :, None]
        )

    compare(run(urpe), run(urpe_reference), tensors)
    with pytest.raises(ValueError, match="one form"):
        urpe(*tensors[:3], bias=tensors[3], multiplier=factor("table"), mask=mask)


def test_dropout_acts_on_the_product(blocks: int) -> None:
    q, k, _ = qkv(batch=1)
    v = torch.eye(N, dtype=torch.float64).expand(1, H, N, N)
    c = factor("table")
    weights = urpe_weights(q, k, multiplier=c)
    torch.manual_seed(3)
    out = urpe(q, k, v, multiplier=c, dropout_p=0.25)
    kept = out != 0
    assert_close(out[kept], weights[kept] / 0.75, 1e-12)
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.02)
    torch.manual_seed(3)
    assert torch.equal(urpe(q, k, v, multiplier=c, dropout_p=0.25), out)
    assert not torch.equal(urpe(q, k, v, multiplier=c, dropout_p=0.25), out)


def test_dropout_gradients_use_the_same_draw(blocks: int) -> None:
    def run(q, k, v, b, c):
        torch.manual_seed(5)
        return urpe(q, k, v, bias=b, multiplier=c, dropout_p=0.4, is_causal=True)

    sizes = {"batch": 1, "queries": 9, "keys": 9}
    tensors = [*qkv(**sizes), factor("table", queries=9, keys=9), factor("matrix", **sizes)]
    leaves = [t[:, :2, :, :2].clone() if t.ndim == 4 else t[:2].clone() for t in tensors]
    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves], atol=1e-6)
    with pytest.raises(ValueError, match="dropout_p"):
        urpe(*tensors[:3], dropout_p=1.0)
    with pytest.raises(ValueError, match="dropout"):
        urpe(*tensors[:3], dropout_p=0.1, implementation="lse")


def test_the_dense_form_is_differentiable_twice() -> None:
    sizes = {"batch": 1, "queries": 4, "keys": 4}
    tensors = [*qkv(**sizes), factor("table", **sizes), factor("table", **sizes)]
    leaves = [t[:, :1, :, :2].clone() if t.ndim == 4 else t[:1].clone() for t in tensors]

    def run(q, k, v, b, c):
        return urpe(q, k, v, bias=b, multiplier=c, implementation="dense")

    assert torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in leaves])


def test_a_table_is_never_expanded() -> None:
    """N = 8192 without an N x N tensor, and training in memory linear in N."""
    length = 8192
    q, k, v = (torch.randn(1, 1, length, 16) for _ in range(3))
    b, c = (torch.randn(1, 2 * length - 1) for _ in range(2))
    with torch.inference_mode(), track_memory() as tracker:
        urpe(q, k, v, bias=b, multiplier=c, is_causal=True)
    assert tracker.largest_numel <= cut._NUMBERS, tracker.largest_operator

    def peak(n: int) -> int:
        tensors = [t[:, :, :n].clone().requires_grad_() for t in (q, k, v)]
        tables = [t[:, : 2 * n - 1].clone().requires_grad_() for t in (b, c)]
        with track_memory() as tracker:
            out = urpe(*tensors, bias=tables[0], multiplier=tables[1])
            out.sum().backward()
        assert tracker.largest_numel < n * n
        return tracker.peak

    assert peak(3072) < 2.2 * peak(1536)


def test_block_by_block_equals_the_dense_result_in_float32() -> None:
    tensors = qkv(batch=1, queries=700, keys=700, dtype=torch.float32)
    b, c = (factor("table", queries=700, keys=700, dtype=torch.float32) for _ in range(2))
    for is_causal in (True, False):
        options = {"bias": b, "multiplier": c, "is_causal": is_causal}
        assert_close(urpe(*tensors, **options), urpe_reference(*tensors, **options), 1e-5)


@pytest.mark.parametrize("length", [1, 7, 30])
def test_a_cache_of_rows_of_different_lengths(length: int) -> None:
    """Rows that hold different numbers of tokens go on by their own places."""
    q, k, v = qkv(batch=2)
    b, c = factor("table"), factor("table")
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 4:9] = False
    _, state = urpe_update(
        None, *(t[:, :, :20] for t in (q, k, v)), bias=b, multiplier=c, mask=mask
    )
    part = slice(20, 20 + length)
    if length == 1:
        out, state = urpe_step(state, *(t[:, :, 20] for t in (q, k, v)), bias=b, multiplier=c)
        out = out[:, :, None]
    else:
        out, state = urpe_update(state, *(t[:, :, part] for t in (q, k, v)), bias=b, multiplier=c)
    assert state.length.tolist() == [20 + length, 15 + length]
    keep = torch.cat((mask, torch.ones(2, length, dtype=torch.bool)), 1)
    whole = urpe(
        *(t[:, :, : 20 + length] for t in (q, k, v)),
        bias=b,
        multiplier=c,
        mask=keep,
        is_causal=True,
    )
    assert_close(out, whole[:, :, part], 1e-12)


def test_a_cache_can_be_trained_through() -> None:
    tensors = [*qkv(), factor("table"), factor("table")]

    def split(q, k, v, b, c):
        state, parts = None, []
        for a, e in ((0, 30), (30, 31), (31, 63)):
            out, state = urpe_update(
                state, *(t[:, :, a:e] for t in (q, k, v)), bias=b, multiplier=c
            )
            parts.append(out)
        return torch.cat(parts, 2)

    compare(
        split, lambda q, k, v, b, c: urpe(q, k, v, bias=b, multiplier=c, is_causal=True), tensors
    )


def test_errors_name_what_is_wrong() -> None:
    q, k, v = qkv()
    for bad, message in (
        (torch.zeros(H, 2 * N), "odd number"),
        (torch.zeros(H, 2 * N - 3), "62 places, the sequence has 63"),
        (torch.zeros(H + 1, 2 * N - 1), "heads of multiplier is 5, expected 4 or 1"),
        (torch.zeros(H, N, N + 1), "matrix"),
        (torch.zeros(2, H, N, N), "batch of multiplier is 2"),
        (torch.zeros(2 * N - 1), "1 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            urpe(q, k, v, multiplier=bad)
    with pytest.raises(ValueError, match="did you mean 'blocked'"):
        urpe(q, k, v, implementation="block")  # type: ignore[arg-type]
    one = [t[:1] for t in (q, k, v)]
    borders = torch.tensor([0, 9, N])
    with pytest.raises(ValueError, match="not both"):
        urpe(*one, cu_seqlens=borders, mask=torch.ones(1, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="tables"):
        urpe(*one, cu_seqlens=borders, bias=torch.zeros(1, N, N))
    with pytest.raises(ValueError, match="bias must be a table"):
        urpe_update(None, q, k, v, bias=torch.zeros(H, N, N))
    _, state = urpe_update(None, q, k, v, bias=torch.zeros(H, 2 * N - 1))
    with pytest.raises(ValueError, match="the sequence has 64"):
        urpe_step(state, *(t[:, :, 0] for t in (q, k, v)), bias=torch.zeros(H, 2 * N - 1))


def test_empty_sequences() -> None:
    q, k, v = (t[:, :, :0] for t in qkv())
    assert urpe(q, k, v, bias=torch.zeros(H, 1)).shape == (B, H, 0, V)


def layer(**options) -> URPEAttention:
    return URPEAttention(URPEConfig(embed_dim=40, num_heads=4, **options)).eval()


def test_the_layer_starts_as_attention_with_a_bias() -> None:
    module = layer(is_causal=False, max_length=80)
    assert (module.multiplier.weight == 1).all()
    x = torch.randn(2, N, 40)
    y = module(x)
    q, k, v = (
        p(x).unflatten(-1, (4, -1)).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=module.bias(N))
    assert_close(y, module.out_proj(plain.transpose(1, 2).flatten(-2)), 1e-6)


@pytest.mark.parametrize("kind", ["unique", "bucketed"])
def test_the_layer_beyond_its_tables(kind: str) -> None:
    with pytest.raises(ValueError, match="max_length 50"):
        layer(max_length=50, beyond="error", bias=kind)(torch.randn(1, N, 40))
    module = layer(max_length=5, bias=kind, multiplier=kind, multiplier_init="normal").double()
    x = torch.randn(1, N, 40, dtype=torch.float64)
    out, state = module.update(x[:, :40], module.init_state(1))
    parts = [out]
    for t in range(40, N):
        out, state = module.step(x[:, t], state)
        parts.append(out[:, None])
    assert_close(torch.cat(parts, 1), module(x), 1e-12)


def test_the_layer_takes_factors_from_outside() -> None:
    """Shared tables, windows and graphs; a layer with none of its own."""
    module = layer(is_causal=False, bias="none", multiplier="none", num_kv_heads=2)
    assert not any("multiplier" in n or "bias.weight" in n for n, _ in module.named_parameters())
    x = torch.randn(2, N, 40)
    b, c = (torch.randn(4, 2 * N - 1) for _ in range(2))
    y = module(x, bias=b, multiplier=c)
    matrices = module(x, bias=expand_factor(b, N, N), multiplier=expand_factor(c, N, N)[None])
    assert_close(matrices, y, 1e-5)
    assert relative_error(module(x), y) > 0.1
    with pytest.raises(ValueError, match="is_causal=False"):
        module.init_state(1)


def test_dropout_of_the_layer_is_for_training_only() -> None:
    module = layer(dropout=0.5)
    x = torch.randn(1, N, 40)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    mask = torch.ones(1, N, dtype=torch.bool)
    mask[0, :5] = False
    torch.manual_seed(2)
    expected = module(x, mask=mask)
    torch.manual_seed(2)
    assert_close(compiled(x, mask=mask)[mask], expected[mask], 1e-6)


def test_options_are_checked() -> None:
    for options, message in (
        ({"embed_dim": 41}, "head_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"bias": "uniqe"}, "unique"),
        ({"multiplier_init": "ones"}, "one"),
        ({"dropout": 1.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            URPEConfig(**({"embed_dim": 40, "num_heads": 4} | options))
