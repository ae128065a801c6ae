"""Sparse-linear attention beyond the contract: blocks, maps, extremes, memory, modules."""

from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention import (
    SLAAttention,
    SLAConfig,
    SoftmaxAttention,
    SoftmaxConfig,
    SparseLinearAttention,
    SparseLinearConfig,
    draw_block_map,
    sla,
    sla_parts,
    sla_reference,
    sla_weights,
    softmax,
)
from manyheads.choose.memory import peak_memory
from manyheads.native import disabled

VARIANTS = ["main", "sla1", "paper"]


def draw(batch=1, heads=2, kv_heads=2, queries=63, keys=63, dim=10, value=6):
    q = torch.randn(batch, heads, queries, dim).double()
    k = torch.randn(batch, kv_heads, keys, dim).double()
    v = torch.randn(batch, kv_heads, keys, value).double()
    return q, k, v, torch.randn(value, value).double(), torch.randn(value).double()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 90),
    blocks=st.tuples(st.sampled_from([1, 5, 8, 32]), st.sampled_from([1, 4, 7, 16, 100])),
    topk=st.sampled_from([0.0, 0.05, 0.3, 0.6, 1.0]),
    negligible=st.sampled_from([0.0, 0.2, 0.9]),
    variant=st.sampled_from(VARIANTS),
    feature_map=st.sampled_from(["softmax", "elu", "relu"]),
    groups=st.sampled_from([1, 2]),
    padded=st.booleans(),
)
def test_gathered_blocks_are_the_definition(
    length, blocks, topk, negligible, variant, feature_map, groups, padded
) -> None:
    """Output and every gradient, any sizes, tails and holes, rows of different lengths."""
    torch.manual_seed(length)
    inputs = draw(batch=2, heads=4, kv_heads=4 // groups, queries=length, keys=length)
    leaves = [t.requires_grad_() for t in inputs]
    mask = torch.rand(2, length) < 0.7 if padded else None
    options = {
        "topk": topk, "negligible": negligible, "block_q": blocks[0], "block_k": blocks[1],
        "variant": variant, "feature_map": feature_map, "mask": mask,
    }  # fmt: skip
    out, expected = sla(*leaves, **options), sla_reference(*leaves, **options)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    if mask is not None and not mask.any():
        return
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad((out * cotangent).sum(), leaves)
    wanted = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("queries", "keys"), [(63, 40), (30, 97), (50, 50)])
def test_queries_of_another_sequence(variant, queries, keys) -> None:
    options = {"topk": 0.3, "block_q": 8, "block_k": 6, "variant": variant}
    q, k, v, w, b = draw(batch=2, queries=queries, keys=keys)
    assert_close(sla(q, k, v, w, b, **options), sla_reference(q, k, v, w, b, **options), 1e-9)
    mask, query_mask = torch.rand(2, keys) < 0.6, torch.rand(2, queries) < 0.6
    out = sla(q, k, v, w, b, mask=mask, query_mask=query_mask, **options)
    for row in range(2):
        rows, columns = query_mask[row], mask[row]
        one = (
            q[row : row + 1, :, rows],
            k[row : row + 1, :, columns],
            v[row : row + 1][:, :, columns],
        )
        assert_close(out[row : row + 1, :, rows], sla_reference(*one, w, b, **options), 1e-9)
        assert (out[row][:, ~rows] == 0).all()
    if queries != keys:
        alone = sla(q, k, v, w, b, mask=mask, **options)
        assert (alone != 0).all(), "a mask of keys leaves all queries real"
    mask[1] = False
    out = sla(q, k, v, w, b, mask=mask, query_mask=torch.ones_like(query_mask), **options)
    assert (out[1] == 0).all(), "no key, no output: not even the bias"


@pytest.mark.parametrize(("block_q", "block_k"), [(64, 64), (128, 64), (20, 7), (5, 100)])
@pytest.mark.parametrize("masked", [True, False])
def test_the_kernel_is_the_torch_form(block_q, block_k, masked) -> None:
    """In float32: output and gradients, tails, groups, padded rows, one of them empty."""
    leaves = [t.float().requires_grad_() for t in
              draw(batch=3, heads=4, queries=517, keys=517, dim=24, value=40)[:3]]  # fmt: skip
    mask = torch.rand(3, 517) < 0.6 if masked else None
    if mask is not None:
        mask[1] = False

    def run():
        out = sla(*leaves, topk=0.3, block_q=block_q, block_k=block_k, mask=mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    with disabled():
        expected = run()
    for found, want in zip(run(), expected, strict=True):
        assert_close(found, want, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_gradients_are_numerically_right(variant, feature_map) -> None:
    leaves = [t.requires_grad_() for t in draw(queries=11, keys=11, dim=3, value=2)]
    assert torch.autograd.gradcheck(
        lambda *t: sla(
            *t, topk=0.5, negligible=0.2, block_q=4, block_k=2, variant=variant,
            feature_map=feature_map,
        ),
        leaves,
    )  # fmt: skip


@pytest.mark.parametrize("length", [7, 64, 200, 257])
def test_all_blocks_critical_is_softmax_attention(length) -> None:
    q, k, v = (torch.randn(2, 2, length, 16) for _ in range(3))
    zero = torch.zeros(16, 16)
    expected = softmax(q, k, v)
    for variant in VARIANTS:
        out = sla(q, k, v, zero, zero[0], topk=1.0, variant=variant)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        parts = sla_parts(q, k, v, topk=1.0, variant=variant)
        assert parts.sparsity == 0
        assert variant == "main" or (parts.o_linear == 0).all()
    torch.testing.assert_close(sla(q, k, v, topk=1.0), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parts_make_the_whole(variant) -> None:
    q, k, v, w, b = draw(batch=3)
    options = {"topk": 0.25, "block_q": 8, "block_k": 8, "variant": variant}
    for mask in (None, torch.rand(3, 63) < 0.7):
        parts = sla_parts(q, k, v, mask=mask, **options)
        whole = parts.o_sparse + parts.o_linear @ w.T + b
        if mask is not None:
            whole = whole.masked_fill(~mask[:, None, :, None], 0)
        assert_close(sla(q, k, v, w, b, mask=mask, **options), whole, 1e-9)
        assert_close(sla(q, k, v, mask=mask, **options), parts.o_sparse, 1e-9)
    weights = sla_weights(q, k, **options)
    parts = sla_parts(q, k, v, **options)
    assert_close(weights.sparse @ v, parts.o_sparse, 1e-9)
    assert_close(weights.linear @ v, parts.o_linear, 1e-9)
    assert torch.equal(weights.block_map, parts.block_map)


def test_the_map_has_the_published_counts() -> None:
    """Rounded down, at least one critical block, and never a critical one negligible."""
    q, k, v, *_ = draw(queries=70, keys=70)
    for topk, negligible, counts in (
        (0.0, 0.0, (1, 0)), (0.05, 0.0, (1, 0)), (0.3, 0.1, (2, 0)), (0.3, 0.3, (2, 2)),
        (0.5, 0.9, (3, 4)), (1.0, 0.5, (7, 0)), (1.0, 0.0, (7, 0)),
    ):  # fmt: skip
        for variant in VARIANTS:
            options = {"topk": topk, "negligible": negligible, "block_q": 16, "block_k": 10}
            parts = sla_parts(q, k, v, variant=variant, **options)
            found = parts.block_map
            assert found.dtype == torch.int8
            assert found.shape == (1, 2, 5, 7)
            assert ((found == 1).sum(-1) == counts[0]).all()
            assert ((found == -1).sum(-1) == (counts[1] if variant == "paper" else 0)).all()
            assert parts.sparsity == pytest.approx(1 - counts[0] / 7)


def test_critical_blocks_are_those_that_matter() -> None:
    """A block of keys along the queries is found, whatever mean all keys share."""
    torch.manual_seed(1)
    direction = F.normalize(torch.randn(32), dim=0)
    q = torch.randn(1, 1, 320, 32) * 0.1 + direction
    k = torch.randn(1, 1, 320, 32) * 0.1 + 1000.0
    k[:, :, 128:192] += direction
    for variant in VARIANTS:
        found = sla_parts(q, k, k, topk=0.2, variant=variant).block_map
        assert (found[0, 0, :, 2] == 1).all()
    equal = torch.ones(1, 1, 320, 4)
    found = sla_parts(equal, equal, equal, topk=0.4, negligible=0.2, variant="paper").block_map
    assert found[0, 0].tolist() == [[1, 1, 0, 0, -1]] * 5, "of equal blocks the earlier is taken"


def test_the_map_of_padded_rows_is_that_of_their_real_tokens() -> None:
    q, k, v, *_ = draw(batch=2)
    mask = torch.ones(2, 63, dtype=torch.bool)
    mask[1, :30] = False
    options = {"topk": 0.3, "negligible": 0.2, "block_q": 8, "block_k": 8, "variant": "paper"}
    found = sla_parts(q, k, v, mask=mask, **options).block_map
    alone = sla_parts(*(t[1:, :, 30:] for t in (q, k, v)), **options).block_map
    assert torch.equal(found[1:, :, :5, :5], alone)
    assert (found[1, :, 5:] == -1).all()
    assert (found[1, :, :, 5:] == -1).all()
    assert torch.equal(found[:1], sla_parts(q[:1], k[:1], v[:1], **options).block_map)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 1.0, 1e3, 1e6])
def test_extremes_are_finite(variant, feature_map, factor) -> None:
    """Zero and huge keys, denominators without a sum, whole blocks and rows of padding."""
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[1] = False
    mask[2, 8:40] = False
    leaves = [(t * factor).float().requires_grad_() for t in draw(batch=3)[:3]]
    weights = [t.float() for t in draw()[3:]]
    for kind in (mask, None):
        out = sla(
            *leaves, *weights, topk=0.2, block_q=8, block_k=8, variant=variant,
            feature_map=feature_map, mask=kind,
        )  # fmt: skip
        assert torch.isfinite(out).all()
        grads = torch.autograd.grad(out.square().mean().clamp_max(1e30), leaves)
        assert all(torch.isfinite(g).all() for g in grads)


def test_a_relu_denominator_of_zero_gives_zero() -> None:
    q, k, v, *_ = draw()
    q[:, :, 5] = -1.0
    for variant in VARIANTS:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        parts = sla_parts(*leaves, topk=0.2, block_k=8, variant=variant, feature_map="relu")
        assert (parts.o_linear[:, :, 5] == 0).all()
        grads = torch.autograd.grad(parts.o_linear.sum(), leaves)
        assert all(torch.isfinite(g).all() for g in grads)


def test_what_stands_in_padding_does_not_matter() -> None:
    q, k, v, w, b = draw(batch=2)
    mask = torch.rand(2, 63) < 0.6
    noisy = [t.masked_fill(~mask[:, None, :, None], torch.nan) for t in (q, k, v)]
    for variant in VARIANTS:
        options = {"topk": 0.3, "block_k": 8, "block_q": 8, "variant": variant, "mask": mask}
        assert torch.equal(sla(*noisy, w, b, **options), sla(q, k, v, w, b, **options))


def test_the_choice_of_blocks_carries_no_gradient() -> None:
    q, k, v, *_ = draw()
    q.requires_grad_()
    parts = sla_parts(q, k, v, block_k=8)
    assert not parts.block_map.requires_grad
    assert parts.o_sparse.requires_grad
    assert parts.o_linear.requires_grad


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_grows_with_the_length_alone(variant) -> None:
    """Twice the length, at most 2.3 times the peak, forward and backward; nothing N x N."""
    peaks = []
    for length in (2048, 4096):
        leaves = [torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3)]
        weight = torch.randn(32, 32, requires_grad=True)
        peak = peak_memory(
            lambda a=leaves, w=weight: sla(*a, w, topk=0.05, variant=variant).sum().backward()
        )
        assert peak.largest_tensor_bytes < 4 * length * 1024
        peaks.append(peak.peak_bytes)
    assert peaks[1] < 2.3 * peaks[0]


def test_errors_name_the_option_and_the_fix() -> None:
    q, k, v, w, b = draw()
    for options, words in (
        ({"variant": "man"}, "main"),
        ({"feature_map": "elu1"}, "elu"),
        ({"topk": 5}, "topk 5"),
        ({"negligible": -0.1}, "negligible"),
        ({"block_q": 0}, "block_q 0"),
        ({"block_k": -1}, "block_k -1"),
        ({"is_causal": True}, "causal"),
    ):
        with pytest.raises(ValueError, match=words):
            sla(q, k, v, **options)
        with pytest.raises(ValueError, match=words):
            sla_parts(q, k, v, **options)
    with pytest.raises(ValueError, match="value_dim"):
        sla(q, k, v, w[:, :3])
    with pytest.raises(ValueError, match="bias"):
        sla(q, k, v, None, b)
    with pytest.raises(ValueError, match="length 0"):
        sla(q, k[:, :, :0], v[:, :, :0])
    with pytest.raises(ValueError, match="not both"):
        sla(q, k, v, mask=torch.ones(1, 63, dtype=torch.bool), cu_seqlens=torch.tensor([0, 63]))
    with pytest.raises(ValueError, match="causal"):
        SLAConfig(embed_dim=8, num_heads=2, is_causal=True)
    with pytest.raises(ValueError, match="topk"):
        SLAConfig(embed_dim=8, num_heads=2, topk=2.0)
    with pytest.raises(ValueError, match="top_k"):
        SparseLinearAttention(8, top_k=0.1)


def test_the_module_starts_as_sparse_attention_and_its_projection_learns() -> None:
    module = SparseLinearAttention(16, topk=0.1, block_q=16, block_k=16, variant="sla1")
    q, k, v = (torch.randn(2, 3, 100, 16, requires_grad=True) for _ in range(3))
    parts, out = module.parts(q, k, v), module(q, k, v)
    assert_close(out, parts.o_sparse, 1e-6)
    out.square().sum().backward()
    assert module.proj_l.weight.grad.abs().sum() > 0
    assert module.proj_l.bias.grad.abs().sum() > 0
    assert set(module.to_official()) == {"proj_l.weight", "proj_l.bias"}
    half = module(*(t.bfloat16() for t in (q, k, v)))
    assert half.dtype == torch.bfloat16
    assert_close(half, out, 2e-2)
    assert SparseLinearAttention(**module.config.to_dict()).config == module.config
    assert SparseLinearConfig(head_dim=16).variant == "main"


def test_weights_of_a_softmax_layer_fit() -> None:
    sizes = {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "is_causal": False}
    dense = SoftmaxAttention(SoftmaxConfig(**sizes))
    layer = SLAAttention(SLAConfig(**sizes, topk=1.0, block_q=8, block_k=8))
    missing = layer.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert missing == ["attention.proj_l.weight", "attention.proj_l.bias"]
    x, mask = torch.randn(2, 50, 32), torch.rand(2, 50) < 0.7
    assert_close(layer(x), dense(x), 1e-5)
    assert_close(layer(x, mask=mask)[mask], dense(x, mask=mask)[mask], 1e-5)
    found = layer.block_map(x, mask=mask)
    assert found.shape == (2, 4, 7, 7)
    assert (found[0, 0, 0] == 1).sum() == -(-int(mask[0].sum()) // 8)


def test_a_map_is_drawn_and_written_as_png(tmp_path) -> None:
    found = sla_parts(*draw(batch=2)[:3], topk=0.3, negligible=0.3, block_q=16, block_k=8,
                      variant="paper").block_map  # fmt: skip
    picture = draw_block_map(found, path=tmp_path / "map.png", cell=3)
    assert picture.shape == (2 * 4 * 3 + 3, 2 * 8 * 3 + 3, 3)
    colours = {int(found[0, 0, i, j]): tuple(picture[3 * i + 1, 3 * j + 1]) for i in range(4)
               for j in range(8)}  # fmt: skip
    assert len(set(colours.values())) == 3
    for b, h, i, j in ((0, 1, 2, 3), (1, 0, 3, 7), (1, 1, 0, 0)):
        pixel = picture[b * 15 + 3 * i, h * 27 + 3 * j]
        assert tuple(pixel) == colours[int(found[b, h, i, j])]
    data = (tmp_path / "map.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (picture.shape[1], picture.shape[0])
    size = struct.unpack(">I", data[33:37])[0]
    assert data[37:41] == b"IDAT"
    lines = zlib.decompress(data[41 : 41 + size])
    assert lines[1 : 1 + 3 * picture.shape[1]] == picture[0].tobytes()
    assert draw_block_map(found[0, 0], cell=1).shape == (4, 8, 3)
    for wrong in (found[0, 0, 0], found.float() + 7):
        with pytest.raises(ValueError, match="block_map"):
            draw_block_map(wrong)
    with pytest.raises(ValueError, match="cell 0"):
        draw_block_map(found, cell=0)
