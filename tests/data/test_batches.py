"""Windows: pure, resumable, dealt to ranks; the held-out text is scored whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyheads.data import HeldOutWindows, TokenBatches

SIZES = st.integers(1, 9), st.integers(1, 4), st.integers(0, 150), st.integers(0, 3)


@given(*SIZES, st.integers(0, 40))
def test_batches_are_windows_and_pure(n: int, b: int, extra: int, seed: int, step: int) -> None:
    tokens = torch.arange(n + 1 + extra, dtype=torch.int32)
    batches = TokenBatches(tokens, length=n, batch_size=b, seed=seed)
    inputs, targets, mask = batches.batch(step)
    assert inputs.shape == targets.shape == (b, n)
    assert inputs.dtype == targets.dtype == torch.int64
    assert mask is None
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(n))
    fresh = TokenBatches(tokens, length=n, batch_size=b, seed=seed)
    for other in (step + 3, 0, step):
        again = fresh.batch(other)
    assert torch.equal(again.inputs, inputs)


@given(*SIZES, st.integers(1, 3))
def test_an_epoch_sees_no_window_twice(n: int, b: int, extra: int, seed: int, epochs: int) -> None:
    tokens = torch.arange(n + 1 + extra)
    batches = TokenBatches(tokens, length=n, batch_size=1, seed=seed)
    for epoch in range(epochs):
        steps = range(epoch * batches.windows, (epoch + 1) * batches.windows)
        seen = torch.cat([batches.batch(s).targets.flatten() for s in steps])
        assert len(seen.unique()) == len(seen)
        assert len(tokens) - 1 - len(seen) < 2 * n


def test_epochs_differ() -> None:
    batches = TokenBatches(torch.arange(4097), length=63, batch_size=1)
    first = [int(batches.batch(s).inputs[0, 0]) for s in range(batches.windows)]
    second = [int(batches.batch(s + batches.windows).inputs[0, 0]) for s in range(batches.windows)]
    assert first != second
    assert first != sorted(first)
    assert first[0] % 63 != second[0] % 63  # the tiling begins elsewhere
    assert (
        TokenBatches(torch.arange(4097), length=63, batch_size=1, seed=1).batch(0).inputs[0, 0]
        != first[0]
    )


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 20))
def test_ranks_share_one_order(b: int, world: int, step: int) -> None:
    tokens = torch.arange(300)
    whole = TokenBatches(tokens, length=7, batch_size=b * world, seed=5).batch(step)
    parts = [
        TokenBatches(tokens, length=7, batch_size=b, seed=5, rank=r, world_size=world).batch(step)
        for r in range(world)
    ]
    assert torch.equal(torch.cat([p.inputs for p in parts]), whole.inputs)


def test_resumed_batches_go_on_equal() -> None:
    tokens = torch.randint(256, (999,), dtype=torch.uint8)
    straight = TokenBatches(tokens, length=20, batch_size=3, seed=4)
    expected = [next(straight) for _ in range(40)]
    first = TokenBatches(tokens, length=20, batch_size=3, seed=4)
    for _ in range(7):
        next(first)
    second = TokenBatches(tokens, length=20, batch_size=3, seed=0)
    next(second)
    second.load_state_dict(first.state_dict())
    for batch, want in zip(second, expected[7:], strict=False):
        assert torch.equal(batch.inputs, want.inputs)
        assert torch.equal(batch.targets, want.targets)
        if second.step == 40:
            break


@given(
    st.integers(2, 60),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 8),
    st.integers(1, 3),
)
def test_held_out_tokens_are_scored_once(
    total: int, n: int, b: int, context: int, world: int
) -> None:
    context = min(context, n - 1)
    tokens = torch.arange(total)
    scored = []
    for rank in range(world):
        windows = HeldOutWindows(
            tokens, length=n, batch_size=b, context=context, rank=rank, world_size=world
        )
        batches = list(windows)
        assert len(batches) == len(windows)
        for inputs, targets, mask in batches:
            assert inputs.shape == targets.shape == mask.shape
            assert len(inputs) <= b
            keep = targets != -100
            assert not (keep & ~mask).any()
            assert torch.equal(targets[keep], inputs[keep] + 1)
            # What stands before a scored token in its window: as much context as was promised.
            first = keep.int().argmax(1)
            past = inputs[torch.arange(len(inputs)), 0]
            assert ((first >= context) | (past == 0)).all()
            scored.append(targets[keep])
    assert torch.equal(torch.cat(scored).sort().values, tokens[1:])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 10}, "10 tokens are too few for a window of length 10, which needs 11"),
        ({"length": 0}, "length is 0"),
        ({"length": 4, "batch_size": 0}, "batch_size is 0"),
        ({"length": 4, "rank": 2, "world_size": 2}, "rank 2 is not below world_size 2"),
        ({"length": 4, "tokens": torch.zeros(10)}, "give integer ids"),
        ({"length": 4, "tokens": torch.zeros(2, 9, dtype=torch.long)}, "give integer ids"),
    ],
)
def test_arguments_that_do_not_fit(kwargs: dict, message: str) -> None:
    arguments = {"tokens": torch.arange(10), "batch_size": 2} | kwargs
    with pytest.raises(ValueError, match=message):
        TokenBatches(arguments.pop("tokens"), **arguments)


def test_held_out_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="context 4 is not in"):
        HeldOutWindows(torch.arange(10), length=4, batch_size=1, context=4)
    with pytest.raises(ValueError, match="1 tokens are too few"):
        HeldOutWindows(torch.arange(1), length=4, batch_size=1)
    with pytest.raises(ValueError, match="step is -1"):
        TokenBatches(torch.arange(10), length=4, batch_size=1).batch(-1)
    with pytest.raises(ValueError, match="negative"):
        TokenBatches(torch.arange(10), length=4, batch_size=1, seed=-1).batch(0)
