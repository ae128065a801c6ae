"""Landmark attention beyond the contract: other places, prefixes, caches, tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close, relative_error
from manyheads.attention import (
    LandmarkAttention,
    LandmarkConfig,
    grouped_softmax,
    insert_landmarks,
    landmark,
    landmark_reference,
    landmark_step,
    landmark_update,
    landmark_weights,
    strip_landmarks,
)
from manyheads.attention.landmark import landmark_jumps, landmark_places
from manyheads.attention.landmark.fast import block_flops
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import peak_memory


def draw(queries=63, keys=None, batch=3, heads=4, kv_heads=2, dim=20):
    q = torch.randn(batch, heads, queries, dim).double()
    k, v = (torch.randn(batch, kv_heads, keys or queries, dim).double() for _ in range(2))
    return q, k, v


def outputs(fn, tensors, **options):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = fn(*leaves, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
    return out, *torch.autograd.grad((out * cotangent).sum(), leaves)


@pytest.mark.parametrize("block_size", [2, 3, 7, 64, 200])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (40, 133), (1, 64), (300, 301)])
def test_blocks_are_the_reference_for_any_prefix(block_size, queries, keys) -> None:
    tensors = draw(queries, keys)
    expected = outputs(landmark_reference, tensors, block_size=block_size)
    for implementation in ("block", "rows", "dense"):
        found = outputs(landmark, tensors, block_size=block_size, implementation=implementation)
        for a, e in zip(found, expected, strict=True):
            assert_close(a, e, 1e-10, implementation)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_landmarks_at_any_places(data) -> None:
    """Neighbouring landmarks, none, the first key: outputs and gradients are the definition's."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    keys = data.draw(st.integers(1, 30))
    queries = data.draw(st.integers(1, keys))
    marks = torch.rand(3, keys) < data.draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    tensors = draw(queries, keys)
    expected = outputs(landmark_reference, tensors, is_landmark=marks)
    found = outputs(landmark, tensors, is_landmark=marks)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["rows", "dense"])
def test_landmarks_at_any_places_with_padding_and_packing(implementation) -> None:
    q, k, v = draw()
    marks = torch.rand(3, 63) < 0.2
    mask = torch.rand(3, 63) < 0.7
    options = {"is_landmark": marks, "implementation": implementation}
    out = landmark(q, k, v, mask=mask, **options)
    expected = landmark_reference(q, k, v, is_landmark=marks, mask=mask)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    borders = torch.tensor([0, 20, 20, 63])
    one = [t[:1] for t in (q, k, v)]
    packed = landmark(*one, is_landmark=marks[:1], cu_seqlens=borders)
    for a, b in ((0, 20), (20, 63)):
        part = (t[:, :, a:b] for t in one)
        alone = landmark_reference(*part, is_landmark=marks[:1, a:b])
        torch.testing.assert_close(packed[:, :, a:b], alone, rtol=1e-9, atol=1e-11)


def test_one_query_by_hand() -> None:
    """Keys 0 1 | 2, 3 4 | 5, 6 with landmarks 2 and 5: the last query's probabilities."""
    s = torch.randn(7).double()
    marks = torch.tensor([[False, False, True, False, False, True, False]])
    weights = grouped_softmax(s.expand(1, 1, 7, 7), marks)[0, 0]
    e = s.exp()
    total = e[2] + e[5] + e[6]
    by_hand = torch.stack((
        e[2] / total * e[0] / (e[0] + e[1]), e[2] / total * e[1] / (e[0] + e[1]), 0 * total,
        e[5] / total * e[3] / (e[3] + e[4]), e[5] / total * e[4] / (e[3] + e[4]), 0 * total,
        e[6] / total,
    ))  # fmt: skip
    torch.testing.assert_close(weights[6], by_hand)
    # The landmark at 5 sees its own block and the landmark before it, and not itself.
    assert weights[5, 5] == 0
    torch.testing.assert_close(weights[5, 3], e[3] / (e[2] + e[3] + e[4]))


def test_weights_are_those_that_act() -> None:
    q, k, v = draw(40, 63)
    weights = landmark_weights(q, k, block_size=9)
    assert_close(weights @ v.repeat_interleave(2, 1), landmark(q, k, v, block_size=9), 1e-12)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 40).double())
    assert (weights[..., 8::9] == 0).all()


def test_a_regular_mask_of_landmarks_takes_the_fast_form() -> None:
    tensors = draw()
    marks = (torch.arange(1, 64) % 9 == 0).expand(3, -1)
    fast = landmark(*tensors, is_landmark=marks, block_size=9, implementation="block")
    assert_close(fast, landmark_reference(*tensors, is_landmark=marks), 1e-12)
    with pytest.raises(ValueError, match="block_size 8"):
        landmark(*tensors, is_landmark=marks, block_size=8, implementation="block")


def test_steps_over_several_blocks_and_rows_of_different_lengths() -> None:
    q, k, v = draw(40)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :7] = mask[1, 10:15] = False
    out, state = landmark_update(
        None, *(t[:, :, :30] for t in (q, k, v)), block_size=6, mask=mask[:, :30]
    )
    parts = [out]
    for t in range(30, 40):
        one, state = landmark_step(state, *(x[:, :, t] for x in (q, k, v)), block_size=6)
        parts.append(one[:, :, None])
    expected = landmark(q, k, v, block_size=6, mask=mask)
    assert_close(torch.cat(parts, 2), expected, 1e-10)
    assert state.length.tolist() == [33, 35, 40]


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (700, 1300), (513, 1024)])
def test_products_of_a_prefix_are_counted(queries, keys) -> None:
    q, k, v = draw(queries, keys, batch=1, heads=1, kv_heads=1)
    for size in (3, 51, 64, 400):
        counted = count_flops(lambda size=size: landmark(q, k, v, block_size=size)).total
        assert counted == block_flops(queries, keys, 20, 20, size)


def test_irregular_landmarks_keep_no_matrix() -> None:
    marks = torch.rand(1, 3000) < 0.05
    q, k, v = (torch.randn(1, 2, 3000, 16, requires_grad=True) for _ in range(3))
    peak = peak_memory(lambda: landmark(q, k, v, is_landmark=marks).sum().backward())
    assert peak.largest_tensor_bytes < 0.5 * 4 * 3000 * 3000


def test_far_scores_do_not_drown_a_group() -> None:
    """A group keeps its own maximum: a block 1,000 below the rest still shares out its gate."""
    s = torch.zeros(1, 1, 6, 6)
    s[..., :2] = -1000.0
    s[..., 0] += 1
    marks = torch.tensor([[False, False, True, False, False, False]])
    weights = grouped_softmax(s, marks)[0, 0, 5]
    expected = torch.tensor([1.0, 0.0]).softmax(0) / 4
    torch.testing.assert_close(weights[:2], expected)
    q = torch.eye(6)[None, None] * 0 + 1.0
    k = torch.zeros(1, 1, 6, 6)
    k[..., :2, :] = -1000 / 6
    k[..., 0, :] += 1 / 6
    out = landmark(q, k, torch.eye(6)[None, None], block_size=3, scale=1.0)
    torch.testing.assert_close(out[0, 0, 4, :2], torch.tensor([1.0, 0.0]).softmax(0) / 3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_a_stream_cut_anywhere_gets_the_same_landmarks(sizes, freq) -> None:
    ids = torch.arange(2 * sum(sizes)).view(2, -1)
    whole = insert_landmarks(ids, freq, -1)
    assert (whole[:, freq :: freq + 1] == -1).all()
    assert torch.equal(strip_landmarks(whole, freq), ids)
    parts, at = [], 0
    for size in sizes:
        part = insert_landmarks(ids[:, at : at + size], freq, -1, offset=at)
        assert torch.equal(landmark_places(size, freq, offset=at), (part == -1)[0])
        assert torch.equal(strip_landmarks(part, freq, offset=at), ids[:, at : at + size])
        parts.append(part)
        at += size
    assert torch.equal(torch.cat([*parts, ids[:, :0]], 1), whole)


def test_layer_with_landmarks_at_other_places() -> None:
    layer = LandmarkAttention(LandmarkConfig(embed_dim=60, num_heads=3, block_size=6))
    x = torch.randn(2, 18, 60)
    marks = (torch.arange(1, 19) % 6 == 0).expand(2, -1)
    assert_close(layer(x, is_landmark=marks), layer(x), 1e-6)
    other = layer(x, is_landmark=marks.roll(1, 1))
    assert relative_error(other, layer(x)) > 1e-2


def test_errors_name_the_fix() -> None:
    q, k, v = draw()
    for call, words in (
        (lambda: landmark(q, k, v, block_size=1), "block_size 1"),
        (lambda: landmark(q, k[:, :, :9], v[:, :, :9]), "63 is above key length 9"),
        (lambda: landmark(q, k, v, implementation="blocks"), "block"),
        (lambda: landmark(q, k, v, is_landmark=torch.ones(1, 63).bool()), "is_landmark"),
        (lambda: landmark(q[:, :, 9:], k, v, mask=torch.ones(3, 63).bool()), "one key for each"),
        (lambda: LandmarkConfig(embed_dim=60, num_heads=3, is_causal=False), "causal only"),
        (lambda: LandmarkConfig(embed_dim=60, num_heads=3, block_size=1), "block_size 1"),
        (lambda: insert_landmarks(torch.tensor([[1, 2]]), 2, 2), "landmark 2"),
        (lambda: insert_landmarks(torch.tensor([[1, 2]]), 0, 3), "freq 0"),
        (lambda: strip_landmarks(torch.tensor([[1, 2]]), 0), "freq 0"),
        (lambda: grouped_softmax(q @ k.repeat_interleave(2, 1).mT, torch.ones(1, 3)), "is_lan"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_group_dropout_leaves_out_whole_blocks() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 4, 63, 63).double()
    marks = (torch.arange(63) % 7 == 6).expand(3, 63)
    whole = grouped_softmax(scores, marks)
    dropped = grouped_softmax(scores, marks, group_dropout=0.3)
    share = dropped / whole.masked_fill(whole == 0, 1)
    own = torch.arange(63)[:, None] // 7 == torch.arange(63) // 7
    real = (whole > 0) & ~own
    assert torch.equal(dropped[:, :, own], whole[:, :, own])
    left = share[real].round(decimals=9).unique()
    torch.testing.assert_close(left, torch.tensor([0, 1 / 0.7]).double())
    blocks = share.masked_fill(~real, -1).unflatten(3, (9, 7))
    # Tokens of a block stay or go together, and each query and head draws for itself.
    seen = real.unflatten(3, (9, 7)).any(-1)
    high = blocks.amax(-1)
    low = blocks.masked_fill(blocks < 0, 9).amin(-1)
    torch.testing.assert_close(high[seen], low[seen])
    stays = (high > 0)[:, :, 56:, :8].flatten(2).double()
    assert abs(float(stays.mean()) - 0.7) < 0.04
    assert not torch.equal(stays[0, 0], stays[0, 1])


def test_group_dropout_has_the_gradient_of_what_it_drew() -> None:
    q, k, v = (torch.randn(1, 2, 23, 5).double().requires_grad_() for _ in range(3))

    def run(*tensors):
        torch.manual_seed(5)
        return landmark(*tensors, block_size=4, group_dropout=0.4)

    assert torch.autograd.gradcheck(run, (q, k, v))
    many = [t.detach().repeat(4000, 1, 1, 1) for t in (q, k, v)]
    mean = landmark(*many, block_size=4, group_dropout=0.2).mean(0, keepdim=True)
    assert_close(mean, landmark(q, k, v, block_size=4), 0.02)


def test_jumps_stand_behind_landmarks() -> None:
    marks = (torch.arange(63) % 7 == 6).expand(50, 63)
    jumps = landmark_jumps(marks, 4)
    steps = jumps.diff(dim=1)
    assert int(jumps[:, 0].max()) == 0
    assert steps[:, marks[0, :-1]].unique().tolist() == [0, 1, 2, 3]
    assert steps[:, ~marks[0, :-1]].unique().tolist() == [0]
    assert not torch.equal(jumps[0], jumps[1])


def test_errors_of_what_is_for_training() -> None:
    q = torch.randn(1, 1, 9, 4)
    for call, words in (
        (lambda: landmark(q, q, q, group_dropout=1.0), "group_dropout 1.0"),
        (lambda: landmark(q, q, q, group_dropout=0.1, implementation="block"), "rows"),
        (lambda: landmark_jumps(torch.ones(1, 3).bool(), 0), "most 0"),
        (lambda: LandmarkConfig(embed_dim=8, num_heads=1, group_dropout=-0.1), "group_dropout"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
