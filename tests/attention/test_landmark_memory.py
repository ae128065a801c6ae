"""The memory of blocks: equal to the whole where it fetches all, and what it does else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention import (
    LandmarkAttention,
    LandmarkConfig,
    LandmarkMemory,
    attend_with_memory,
    block_sparse,
    grouped_softmax,
)
from manyheads.attention.landmark import landmark_block_mask
from manyheads.attention.landmark.select import turn

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


def build(**options) -> LandmarkAttention:
    values = {"embed_dim": 48, "num_heads": 4, "num_kv_heads": 2, "block_size": 5} | options
    return LandmarkAttention(LandmarkConfig(**values)).double().eval()


def read(layer, x, memory, sizes):
    return torch.cat([layer.remember(part, memory) for part in x.split(sizes, 1)], 1)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fetching_all_blocks_is_the_whole(data) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    layer = build(
        rotary_theta=data.draw(st.sampled_from([None, 10000.0])),
        rotary_interleaved=data.draw(st.booleans()),
    )
    x = torch.randn(3, 43, 48).double()
    cuts = sorted(data.draw(st.lists(st.integers(1, 42), max_size=5, unique=True)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, 43], strict=True)]
    memory = layer.new_memory(
        top_k=data.draw(st.sampled_from([8, 20])),
        selection=data.draw(st.sampled_from(SELECTIONS)),
        positions=data.draw(st.sampled_from(["stingy", "exact"])),
    )
    with torch.no_grad():
        # Angles are float32, so that positions apart by a shift differ in the seventh place.
        assert_close(read(layer, x, memory, sizes), layer(x), 1e-5)
    assert (memory.seen, memory.stored, memory.tail_length) == (8, 8, 3)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_fetched_scores_best(selection) -> None:
    torch.manual_seed(3)
    memory = LandmarkMemory(block_size=4, top_k=3, selection=selection, rotary_theta=None)
    key, value = torch.randn(2, 2, 30, 8), torch.randn(2, 2, 30, 8)
    memory.append(key, value)
    query = torch.randn(2, 4, 6, 8)
    found = memory.retrieve(query)
    gates = key[:, :, 3:28:4].repeat_interleave(2, 1)
    scores = query @ gates.mT * 8**-0.5
    if selection == "max_over_heads":
        scores = scores.softmax(-1).amax(1, keepdim=True).expand(-1, 4, -1, -1)
    elif selection == "max_over_tokens":
        scores = scores.softmax(-1).amax(2, keepdim=True)
    assert torch.equal(found.block, scores.topk(3).indices.sort(-1).values)
    number = int(found.block[1, 3, 0, 1])
    block = slice(4 * number, 4 * number + 4)
    assert torch.equal(found.values[1, 3, 0, 1], value[1, 1, block])
    torch.testing.assert_close(
        found.scores[1, 3, 0, 1], key[1, 1, block] @ query[1, 3, 0] * 8**-0.5
    )


def test_old_blocks_share_a_place_and_the_newest_keep_theirs() -> None:
    memory = LandmarkMemory(block_size=4, top_k=2)
    key = torch.randn(1, 1, 23, 8).double()
    memory.append(key, key)
    assert (memory.start, memory.tail_length) == (15, 3)
    query = torch.randn(1, 1, 1, 8).double()
    at = {"theta": 10000.0, "interleaved": False}
    turned = turn(query, 15, **at)[0, 0, 0]
    for pair, bases in (((0, 2), (0, 4)), ((1, 4), (0, 8)), ((3, 4), (4, 8))):
        found = memory.fetch(query, torch.tensor(pair)[None, None, None])
        for i, (number, base) in enumerate(zip(pair, bases, strict=True)):
            places = torch.arange(base, base + 4)[None, None]
            keys = turn(key[:, :, 4 * number : 4 * number + 4], places, **at)[0, 0]
            torch.testing.assert_close(
                found.scores[0, 0, 0, i], keys @ turned * 8**-0.5, atol=1e-6, rtol=1e-6
            )


def test_equal_landmarks_give_the_newest() -> None:
    memory = LandmarkMemory(block_size=3, top_k=2, rotary_theta=None)
    memory.append(torch.ones(1, 1, 30, 4), torch.ones(1, 1, 30, 4))
    assert memory.select(torch.randn(1, 2, 5, 4)).unique().tolist() == [8, 9]
    better = torch.ones(1, 1, 3, 4)
    better[:, :, 2] = 2
    memory.append(better, better)
    memory.append(torch.ones(1, 1, 9, 4), torch.ones(1, 1, 9, 4))
    assert memory.select(torch.ones(1, 2, 5, 4)).unique().tolist() == [10, 13]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_ring_forgets_the_oldest_wherever_it_is_kept(selection, tmp_path) -> None:
    layer = build()
    x = torch.randn(2, 97, 48).double()
    sizes = [1, 30, 17, 40, 9]
    outs, memories = [], []
    for options in (
        {},
        {"capacity": 5},
        {"capacity": 5, "storage_device": "cpu"},
        {"capacity": 5, "path": tmp_path / "blocks"},
    ):
        memory = layer.new_memory(top_k=3, selection=selection, **options)
        with torch.no_grad():
            outs.append(read(layer, x, memory, sizes))
        memories.append(memory)
    assert_close(outs[1], outs[2], 1e-12)
    assert_close(outs[1], outs[3], 1e-12)
    assert float((outs[0] - outs[1]).abs().max()) > 1e-6
    assert [m.stored for m in memories] == [19, 5, 5, 5]
    assert (tmp_path / "blocks" / "0.bin").stat().st_size == 5 * 2 * 2 * 5 * 12 * 8
    assert memories[1].select(torch.randn(2, 4, 3, 12).double()).min() >= 14


def test_a_block_longer_than_the_ring_keeps_its_end() -> None:
    memory = LandmarkMemory(block_size=2, top_k=9, capacity=3, rotary_theta=None)
    value = torch.arange(20.0).view(1, 1, 20, 1).expand(-1, -1, -1, 2)
    memory.append(torch.randn(1, 1, 20, 2), value)
    found = memory.retrieve(torch.randn(1, 1, 1, 2))
    assert found.block.flatten().tolist() == [7, 8, 9]
    assert found.values[..., 0].flatten().tolist() == list(range(14, 20))


def test_branches_beams_and_resets() -> None:
    layer = build()
    x = torch.randn(3, 60, 48).double()
    with torch.no_grad():
        memory = layer.new_memory(top_k=2)
        layer.remember(x[:, :33], memory)
        branch = memory.clone()
        expected = layer.remember(x[:, 33:], memory)
        order = torch.tensor([2, 0])
        branch.reorder(order)
        assert_close(layer.remember(x[order, 33:], branch), expected[order], 1e-12)
        memory.reset()
        assert (memory.stored, memory.tail_length) == (0, 0)
        assert_close(layer.remember(x[:, :33], memory), layer(x[:, :33]), 1e-5)


def test_half_precision_is_kept_and_positions_stay_small() -> None:
    memory = LandmarkMemory(block_size=5, top_k=2)
    for _ in range(40):
        q, k, v = (torch.randn(1, 2, 13, 8).bfloat16() for _ in range(3))
        out = attend_with_memory(memory, q, k, v)
        assert out.dtype == torch.bfloat16
        assert torch.isfinite(out).all()
        assert memory.start < 3 * 5 + 5
    assert memory.stored == 40 * 13 // 5


def test_the_official_start_overlaps_with_exactly_k_blocks() -> None:
    starts = []
    for official in (True, False):
        memory = LandmarkMemory(block_size=4, top_k=2, official_start=official)
        memory.append(torch.randn(1, 1, 9, 8), torch.randn(1, 1, 9, 8))
        starts.append(memory.start)
    assert starts == [9, 13]


def test_errors_name_the_fix() -> None:
    memory = LandmarkMemory(block_size=4, top_k=2)
    layer = build()
    for call, words in (
        (lambda: LandmarkMemory(block_size=4, top_k=0), "top_k 0"),
        (lambda: LandmarkMemory(block_size=1, top_k=2), "block_size 1"),
        (lambda: LandmarkMemory(block_size=4, top_k=1, capacity=0), "capacity 0"),
        (lambda: LandmarkMemory(block_size=4, top_k=1, selection="max_over_token"), "max_over"),
        (lambda: LandmarkMemory(block_size=4, top_k=1, positions="absolute"), "exact"),
        (lambda: LandmarkMemory(block_size=4, top_k=1, path="x"), "capacity"),
        (lambda: memory.retrieve(torch.zeros(1, 1, 1, 8)), "no whole block"),
        (lambda: layer.remember(torch.zeros(1, 1, 48).double(), memory), "block_size"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    memory.append(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    with pytest.raises(ValueError, match="memory holds"):
        memory.append(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("before", [3, 63, 200])
def test_the_map_holds_all_that_is_met(selection, before) -> None:
    """The grouped softmax over the map is the memory's output; a softmax over it is not."""
    torch.manual_seed(before)
    memory = LandmarkMemory(
        block_size=5, top_k=3, selection=selection, rotary_theta=None, capacity=20
    )
    past = torch.randn(2, 2, 2, before, 8).double()
    memory.append(*past)
    q, k, v = torch.randn(2, 4, 7, 8).double(), *torch.randn(2, 2, 2, 7, 8).double()
    mask = landmark_block_mask(memory, q)
    held = mask.shape[3]
    keys, values = (
        torch.cat((old, new), 2)[:, :, -held:].repeat_interleave(2, 1)
        for old, new in zip(past, (k, v), strict=True)
    )
    scores = (q @ keys.mT * 8**-0.5).masked_fill(~mask.to_dense(), -torch.inf)
    marks = (torch.arange(held) % 5 == 4).expand(2, -1)
    wanted = grouped_softmax(scores, marks) @ values
    other = block_sparse(q, keys, values, mask)
    assert mask.shape == (2, 4, 7, min(before // 5, 20) * 5 + before % 5 + 7)
    assert_close(attend_with_memory(memory, q, k, v), wanted, 1e-12)
    assert float((other - wanted).abs().max()) > 1e-3
