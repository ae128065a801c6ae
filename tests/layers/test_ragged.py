"""Padding and packing helpers, on random masks and borders."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.layers.ragged import (
    check_cu_seqlens,
    check_mask,
    compact,
    map_lengths,
    map_packed,
    positions,
    sequence_ids,
)

MASKS = st.integers(1, 12).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=4).map(
        torch.tensor
    )
)


@given(mask=MASKS)
def test_compaction_moves_real_tokens_to_the_front_and_back(mask) -> None:
    moved = compact(mask)
    x = torch.randn(*mask.shape, 3)
    front = moved.gather(x)
    for row in range(mask.shape[0]):
        count = int(mask[row].sum())
        assert torch.equal(front[row, :count], x[row, mask[row]])
        assert moved.front[row].tolist() == [i < count for i in range(mask.shape[1])]
    assert torch.equal(moved.scatter(front), x)
    heads = torch.randn(mask.shape[0], 2, mask.shape[1], 3)
    assert torch.equal(moved.scatter(moved.gather(heads, dim=2), dim=2), heads)


@given(mask=MASKS)
def test_positions_count_real_tokens(mask) -> None:
    places = positions(mask, mask.shape[1], device=mask.device)
    for row in range(mask.shape[0]):
        assert places[row, mask[row]].tolist() == list(range(int(mask[row].sum())))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum))
def test_packed_sequences_are_seen_alone(lengths) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    total = int(borders[-1])
    x, weights = torch.randn(1, 2, total, 3), torch.randn(len(lengths), 2)

    def fn(t, w, mask):
        assert t.shape[0] == mask.shape[0] == w.shape[0]
        kept = t * mask[:, None, :, None]
        return kept.cumsum(2) * w[..., None, None], kept.sum((2, 3))

    out, sums = map_packed(fn, (x,), borders, per_sequence=(weights,))
    for s, (a, b) in enumerate(pairwise(borders)):
        part = x[0, :, a:b]
        torch.testing.assert_close(out[0, :, a:b], part.cumsum(1) * weights[s, :, None, None])
        torch.testing.assert_close(sums[s], part.sum((1, 2)))
    ids = sequence_ids(borders, total)
    assert ids.tolist() == [s for s, n in enumerate(lengths) for _ in range(n)]


def test_buckets_bound_the_padding() -> None:
    """However uneven the lengths, at most about half of what is computed is padding."""
    lengths = [1] * 50 + [3] * 20 + [400]
    borders, cells = torch.tensor([0, *lengths]).cumsum(0), []

    def fn(t, mask):
        cells.append(mask.numel())
        return t

    map_packed(fn, (torch.randn(1, 1, sum(lengths), 2),), borders)
    assert sum(cells) <= 2 * sum(lengths)


def test_errors() -> None:
    with pytest.raises(ValueError, match="bool"):
        check_mask(torch.zeros(1, 3), 1, 3)
    with pytest.raises(ValueError, match=r"\(1, 4\)"):
        check_mask(torch.ones(1, 3, dtype=torch.bool), 1, 4)
    with pytest.raises(ValueError, match="batch of 1"):
        check_cu_seqlens(torch.tensor([0, 3]), 2, 3)
    for wrong in ([0, 2], [1, 3], [0, 2, 1, 3], [3]):
        with pytest.raises(ValueError, match="rise from 0"):
            check_cu_seqlens(torch.tensor(wrong), 1, 3)


def test_rows_of_one_length_are_mapped_together() -> None:
    x = torch.randn(4, 2, 6, 3)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 2:5] = mask[1, :3] = mask[3, :] = True
    lengths = []

    def shifted(t, absent):
        assert absent is None
        lengths.append(tuple(t.shape))
        return t.roll(1, 2)

    out = map_lengths(shifted, (x, None), mask)
    assert lengths == [(1, 2, 6, 3), (2, 2, 3, 3)]
    assert torch.equal(out[0, :, 2:5], x[0, :, 2:5].roll(1, 1))
    assert torch.equal(out[1, :, :3], x[1, :, :3].roll(1, 1))
    assert torch.equal(out[3], x[3].roll(1, 1))
    assert (out[2] == 0).all()
    assert (out[0, :, :2] == 0).all()
    assert (out.new_tensor(0) == map_lengths(shifted, (x, None), mask & False)).all()
