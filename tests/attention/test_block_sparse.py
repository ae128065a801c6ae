"""Block-sparse attention: kernel and PyTorch form against dense softmax, masks, pictures."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import flex_attention as flex

from compare import assert_close
from manyheads.attention import (
    BlockMask,
    and_masks,
    block_sparse,
    block_sparse_reference,
    causal_mask,
    create_block_mask,
    document_mask,
    or_masks,
    prefix_lm_mask,
    sliding_window_mask,
)
from manyheads.choose.memory import peak_memory
from manyheads.native import disabled, library


def draw(batch=2, heads=4, kv_heads=2, queries=63, keys=63, dim=20, value=13):
    q = torch.randn(batch, heads, queries, dim).double()
    k = torch.randn(batch, kv_heads, keys, dim).double()
    v = torch.randn(batch, kv_heads, keys, value).double()
    return q, k, v


def masks(batch: int, length: int) -> dict[str, object]:
    documents = torch.arange(length).div(11, rounding_mode="floor").repeat(batch, 1)
    documents[-1] = torch.arange(length).div(17, rounding_mode="floor")
    return {
        "causal": causal_mask,
        "window": sliding_window_mask(9, 4),
        "prefix": prefix_lm_mask(torch.arange(batch) * 10 + 3),
        "documents": and_masks(causal_mask, document_mask(documents)),
        "sinks": or_masks(and_masks(causal_mask, sliding_window_mask(5)), lambda b, h, q, k: k < 2),
        "heads": lambda b, h, q, k: (q - k).abs() % (h + 2) == 0,
        "nothing": or_masks(),
        "everything": and_masks(),
        "late": lambda b, h, q, k: (q > 20) & (k > q - 3),
    }


NAMES = list(masks(1, 1))


def check(mask, leaves, limits, **options) -> None:
    """Output and gradients in float64, and of the kernel in float32."""
    expected = block_sparse_reference(*leaves, mask, **options)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), leaves)
    for limit, dtype in zip(limits, (torch.float64, torch.float32), strict=True):
        used = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = block_sparse(*used, mask, **options)
        assert out.dtype == dtype
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
        grads = torch.autograd.grad((out * cotangent.to(dtype)).sum(), used)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad.double(), want, rtol=limit, atol=10 * limit)


@settings(max_examples=80, deadline=None)
@given(
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    size=st.tuples(st.sampled_from([1, 5, 16, 33, 64]), st.sampled_from([1, 4, 7, 16, 50, 128])),
    groups=st.sampled_from([1, 2, 4]),
    dims=st.sampled_from([(1, 1), (7, 20), (16, 32), (40, 3)]),
    name=st.sampled_from(NAMES),
    per_sample=st.booleans(),
)
def test_blocks_are_dense_softmax(queries, keys, size, groups, dims, name, per_sample) -> None:
    """Any sizes, tails and groups; partial and whole blocks, lists of different lengths."""
    torch.manual_seed(queries + keys)
    dim, value = dims
    leaves = draw(kv_heads=4 // groups, queries=queries, keys=keys, dim=dim, value=value)
    mod = masks(2, max(queries, keys))[name]
    shared = not per_sample and name not in ("prefix", "documents", "heads")
    batch, heads = (None, None) if shared else (2, 4)
    mask = create_block_mask(mod, batch, heads, queries, keys, size)
    b, h, q, k = (
        torch.arange(n).view(-1, *(1,) * (3 - i)) for i, n in enumerate((2, 4, queries, keys))
    )
    dense = mod(b, h, q, k).expand(2, 4, queries, keys)
    assert torch.equal(mask.to_dense().expand_as(dense), dense)
    check(mask, [t.requires_grad_() for t in leaves], (1e-9, 2e-5))


def test_the_kernel_and_the_torch_form_agree_and_are_deterministic() -> None:
    if library("sparse") is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(3)
    leaves = [t.float().requires_grad_() for t in draw(queries=517, keys=389, dim=64, value=48)]
    mask = create_block_mask(sliding_window_mask(100, 30), None, None, 517, 389, (64, 32))

    def run():
        out = block_sparse(*leaves, mask)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    kernel = run()
    assert all(torch.equal(a, b) for a, b in zip(kernel, run(), strict=True))
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(kernel, run(), strict=True))
    finally:
        torch.set_num_threads(1)
    with disabled():
        for a, b in zip(kernel, run(), strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e3, 1e6])
def test_extremes_and_rows_without_keys(factor, kernel) -> None:
    leaves = [(t * factor).float().requires_grad_() for t in draw()]
    mask = create_block_mask(lambda b, h, q, k: (q >= 30) & (k <= q), None, None, 63, 63, 8)
    if kernel:
        out = block_sparse(*leaves, mask)
        grads = torch.autograd.grad(out.sum(), leaves)
    else:
        with disabled():
            out = block_sparse(*leaves, mask)
            grads = torch.autograd.grad(out.sum(), leaves)
    assert (out[:, :, :30] == 0).all()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[0][:, :, :30] == 0).all()


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_do(empty, dtype) -> None:
    sizes = {empty: 0}
    leaves = [t.to(dtype).requires_grad_() for t in draw(**sizes)]
    mask = create_block_mask(causal_mask, None, None, leaves[0].shape[2], leaves[1].shape[2], 16)
    out = block_sparse(*leaves, mask)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_strides(dtype) -> None:
    q, k, v = (t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in draw())
    mask = create_block_mask(causal_mask, None, None, 63, 63, 16)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = block_sparse(*leaves, mask)
    assert_close(out, block_sparse_reference(*leaves, mask), 1e-5)
    grads = torch.autograd.grad(out.sum(), leaves)  # the cotangent is expanded: strides of 0
    wanted = torch.autograd.grad(block_sparse_reference(*leaves, mask).sum(), leaves)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)


def test_no_mask_and_a_scale() -> None:
    check(None, [t.requires_grad_() for t in draw(queries=130, keys=70)], (1e-9, 2e-5), scale=0.3)


def alibi(score, b, h, q_idx, kv_idx):
    return score - (h + 1) * 0.1 * (q_idx - kv_idx).abs()


def softcap(score, b, h, q_idx, kv_idx):
    return 5.0 * torch.tanh(score / 5.0)


@pytest.mark.parametrize("mod", [alibi, softcap])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_changed(mod, name) -> None:
    for queries, keys, size in ((63, 63, 16), (50, 97, (7, 10))):
        leaves = [t.requires_grad_() for t in draw(queries=queries, keys=keys)]
        mask = create_block_mask(masks(2, 97)[name], 2, 4, queries, keys, size)
        check(mask, leaves, (1e-9, 3e-5), score_mod=mod)


class Table(nn.Module):
    """A learned bias of relative positions, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(4, 127).double())

    def forward(self, score, b, h, q_idx, kv_idx):
        return score + self.bias[h, q_idx - kv_idx + 63]


def scaled_by(factor, score, b, h, q_idx, kv_idx):
    return score * factor["by"]


def test_what_a_score_mod_holds_gets_its_gradient() -> None:
    table = Table()
    raw = torch.randn(4).double().requires_grad_()
    slopes = raw.exp()  # not a leaf
    factor = torch.tensor(1.3).double().requires_grad_()
    leaves = [t.requires_grad_() for t in draw()]
    mask = create_block_mask(causal_mask, None, None, 63, 63, 16)
    for mod, held in (
        (table, table.bias),
        (lambda s, b, h, q, k: s - slopes[h] * (q - k), raw),
        (functools.partial(scaled_by, {"by": factor}), factor),
        (lambda s, b, h, q, k: table(s, b, h, q, k), table.bias),
    ):
        grads = []
        for attend in (block_sparse, block_sparse_reference):
            out = attend(*leaves, mask, score_mod=mod)
            grads.append(
                torch.autograd.grad(out.square().sum(), [*leaves, held], retain_graph=True)
            )
        for grad, want in zip(*grads, strict=True):
            assert_close(grad, want, 1e-9)


GLOBAL = torch.tensor(0.7).double().requires_grad_()


class Hidden:
    factor = torch.tensor(0.7).double().requires_grad_()


def test_globals_get_theirs_and_what_is_not_found_raises() -> None:
    leaves = [t.requires_grad_() for t in draw()]
    grads = []
    for attend in (block_sparse, block_sparse_reference):
        out = attend(*leaves, score_mod=lambda s, b, h, q, k: s * GLOBAL)
        grads.append(torch.autograd.grad(out.square().sum(), GLOBAL)[0])
    assert_close(*grads, 1e-9)
    out = block_sparse(*leaves, score_mod=lambda s, b, h, q, k: s * Hidden.factor)
    with pytest.raises(ValueError, match="close over"):
        out.sum().backward()


@pytest.mark.parametrize("size", [128, (32, 16), (128, 64)])
@pytest.mark.parametrize("name", ["causal", "window", "documents", "heads", "everything"])
def test_masks_of_flex_attention_are_taken(size, name) -> None:
    torch.manual_seed(0)
    length = 256 if size == 128 else 200
    mod = masks(2, length)[name]
    theirs = flex.create_block_mask(mod, 2, 4, length, length, device="cpu", BLOCK_SIZE=size)
    leaves = [t.requires_grad_() for t in draw(queries=length, keys=length)]
    ours = create_block_mask(mod, 2, 4, length, length, size)
    out = block_sparse(*leaves, theirs)
    assert torch.equal(out, block_sparse(*leaves, ours))
    without_full = flex.BlockMask.from_kv_blocks(
        torch.ones(1, 1, -(-length // 64), dtype=torch.int32),
        torch.zeros(1, 1, -(-length // 64), -(-length // 64), dtype=torch.int32),
        BLOCK_SIZE=64, seq_lengths=(length, length),
    )  # fmt: skip
    check(without_full, leaves, (1e-9, 2e-5))
    with pytest.raises(ValueError, match="BlockMask"):
        block_sparse(*leaves, torch.ones(length, length))


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
@pytest.mark.parametrize("mod", [None, alibi])
def test_flex_attention_gives_the_same(name, mod) -> None:
    q, k, v = (t.float() for t in draw(queries=256, keys=256, dim=16, value=16))
    mask_mod = masks(2, 256)[name]
    theirs = flex.create_block_mask(mask_mod, 2, 4, 256, 256, device="cpu", BLOCK_SIZE=64)
    expected = flex.flex_attention(q, k, v, mod, theirs, enable_gqa=True)
    mask = create_block_mask(mask_mod, 2, 4, 256, 256, 64)
    assert_close(block_sparse(q, k, v, mask, score_mod=mod), expected, 1e-5)
    assert_close(block_sparse(q, k, v, theirs, score_mod=mod), expected, 1e-5)


@pytest.mark.parametrize("mod", [None, alibi])
def test_memory_grows_with_the_length_alone(mod) -> None:
    peaks = []
    for length in (2048, 4096):
        leaves = [torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3)]

        def call(leaves=leaves, length=length) -> None:
            window = create_block_mask(sliding_window_mask(100), None, None, length, length)
            block_sparse(*leaves, window, score_mod=mod).sum().backward()

        mask = create_block_mask(sliding_window_mask(100), None, None, length, length)
        peak = peak_memory(
            lambda a=leaves, m=mask: block_sparse(*a, m, score_mod=mod).sum().backward()
        )
        assert peak.largest_tensor_bytes < 4 * length * 1024
        peaks.append(peak.peak_bytes)
        assert peak_memory(call).largest_tensor_bytes < 2**25 + length * 4096
    assert peaks[1] < 2.3 * peaks[0]


def test_a_compiled_function_is_one_graph() -> None:
    mask = create_block_mask(causal_mask, None, None, 63, 63, 16)
    leaves = [t.float().requires_grad_() for t in draw()]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        return block_sparse(q, k, v, mask) * 2

    out, expected = attend(*leaves), block_sparse(*leaves, mask) * 2
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_half_precision_comes_back() -> None:
    leaves = draw()
    mask = create_block_mask(causal_mask, None, None, 63, 63, 16)
    out = block_sparse(*(t.bfloat16() for t in leaves), mask)
    assert out.dtype == torch.bfloat16
    assert_close(out, block_sparse_reference(*leaves, mask), 2e-2)


def test_alike_blocks_are_kept_once() -> None:
    mask = create_block_mask(causal_mask, 3, 2, 1000, 1000, 64)
    assert mask.visits.bits is not None
    assert len(mask.visits.bits) == 2, "the diagonal, and its last block with a tail"
    assert len(mask.visits.columns) == 6 * 136
    assert mask.sparsity == pytest.approx(1 - 136 / 256)
    comb = create_block_mask(lambda b, h, q, k: k % 2 == 0, None, None, 1024, 1024, 64)
    assert comb.visits.bits is not None
    assert len(comb.visits.bits) == 1
    assert comb.to("cpu").visits.bits is not None


def test_a_map_of_blocks_is_a_mask() -> None:
    there = torch.rand(2, 4, 4, 5) < 0.4
    mask = BlockMask.from_block_map(there, 63, 77, 16)
    assert mask.shape == (2, 4, 63, 77)
    assert torch.equal(mask.block_map() == 1, there)
    whole = there.repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :63, :77]
    assert torch.equal(mask.to_dense(), whole)
    check(mask, [t.requires_grad_() for t in draw(keys=77)], (1e-9, 2e-5))
    with pytest.raises(ValueError, match=r"\(\.\.\., 4, 5\)"):
        BlockMask.from_block_map(there[..., :4], 63, 77, 16)


def test_pictures(tmp_path) -> None:
    mask = create_block_mask(causal_mask, None, None, 40, 40, 16)
    assert str(mask) == "▒··\n█▒·\n██▒"
    picture = mask.draw(tmp_path / "map.png", cell=2)
    assert picture.shape == (6, 6, 3)
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert len({tuple(picture[2 * i, 2 * j]) for i in range(3) for j in range(3)}) == 3
    two = str(create_block_mask(causal_mask, None, 2, 16, 16, 16))
    assert two == "sample 0, head 0\n▒\nsample 0, head 1\n▒"
    long = str(create_block_mask(causal_mask, None, None, 1000, 1000, 8)).splitlines()
    assert max(len(line) for line in long) <= 96


def test_errors_name_the_axis_and_the_fix() -> None:
    q, k, v = draw()
    mask = create_block_mask(causal_mask, 3, None, 63, 63, 16)
    with pytest.raises(ValueError, match="batch of block_mask is 3"):
        block_sparse(q, k, v, mask)
    mask = create_block_mask(causal_mask, None, None, 64, 63, 16)
    with pytest.raises(ValueError, match="64 queries, there are 63"):
        block_sparse(q, k, v, mask)
    for options, words in (({"block_size": 0}, "block_size 0"), ({"B": 0}, "B 0")):
        given_options = {"B": None, "H": None, "Q_LEN": 8, "KV_LEN": 8} | options
        with pytest.raises(ValueError, match=words):
            create_block_mask(causal_mask, **given_options)
    with pytest.raises(ValueError, match="boolean"):
        create_block_mask(lambda b, h, i, j: i - j, None, None, 8, 8)
    with pytest.raises(ValueError, match="score_mod"):
        block_sparse(q, k, v, score_mod=lambda s, b, h, i, j: s.sum())
    with pytest.raises(ValueError, match="before -1"):
        sliding_window_mask(-1)
    with pytest.raises(ValueError, match="documents"):
        document_mask(torch.zeros(()))
