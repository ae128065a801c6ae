"""Landmark's kernel against the PyTorch form of the same memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.attention.landmark import LandmarkMemory, attend_with_memory
from manyheads.attention.landmark import native as landmark_native
from manyheads.choose.flops import count_flops
from manyheads.models.language.landmark import LandmarkGPT, LandmarkGPTConfig
from manyheads.native import disabled, library
from native.calls_landmark import STREAMS, stream

pytestmark = pytest.mark.skipif(
    library("landmark") is None, reason="no C++ compiler: there are no kernels to test"
)


@pytest.fixture
def used(monkeypatch) -> list[int]:
    """A list that grows by each call of the kernel."""
    calls: list[int] = []
    real = landmark_native._op

    def op(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(landmark_native, "_op", op)
    return calls


def unclear(memory, query) -> bool:
    """Whether rounding decides which scores count as equal, so that both choices are right."""
    scores, slack = memory._landmark_scores(query)
    if memory.selection == "max_over_heads":
        scores, slack = scores.log_softmax(-1).amax(1), slack.amax(1)
    least = scores.topk(min(memory.top_k, memory.stored)).values[..., -1:]
    return bool((((scores - least).abs() - slack).abs() < slack / 4).any())


def compare(sizes, options, *, seed: int = 0, must_be_clear: bool = False) -> None:
    memory, *tokens = stream(sizes, options, seed=seed)
    plain = memory.clone()
    for i in range(9):
        new = [t[:, :, i : i + 1] for t in tokens]
        if must_be_clear and plain.stored:
            assume(not unclear(plain, new[0]))
        out = attend_with_memory(memory, *new)
        with disabled():
            wanted = attend_with_memory(plain, *new)
        assert_close(out, wanted, 1e-5)
    assert memory.seen == plain.seen
    assert all(torch.equal(a, b) for a, b in zip(memory.held, plain.held, strict=True))


@pytest.mark.parametrize(("sizes", "options"), STREAMS, ids=str)
@pytest.mark.parametrize("threads", [1, 3, 50])
def test_a_token(sizes, options, threads, used, monkeypatch) -> None:
    monkeypatch.setattr(landmark_native, "_PRODUCTS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(sizes, options)
    finally:
        torch.set_num_threads(before)
    assert len(used) == 9


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (8, 1)]),
    dim=st.integers(1, 40).map(lambda n: 2 * n),
    values=st.integers(5, 140),
    size=st.integers(2, 40),
    before=st.integers(1, 900),
    top_k=st.integers(1, 40),
    capacity=st.sampled_from([None, 1, 6]),
    selection=st.sampled_from(["per_token_and_head", "max_over_heads", "max_over_tokens"]),
    positions=st.sampled_from(["stingy", "exact"]),
    theta=st.sampled_from([None, 10000.0, 500.0]),
    interleaved=st.booleans(),
    official=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_stream(
    batch, heads, dim, values, size, before, top_k, capacity, selection, positions, theta,
    interleaved, official, seed,
) -> None:  # fmt: skip
    options = {
        "top_k": top_k, "capacity": capacity, "selection": selection, "positions": positions,
        "rotary_theta": theta, "rotary_interleaved": interleaved, "official_start": official,
    }  # fmt: skip
    sizes = (batch, *heads, dim, values, size, before)
    compare(sizes, options, seed=seed, must_be_clear=True)


def test_equal_landmarks_give_the_newest_as_in_pytorch(used) -> None:
    for better in (0.0, 1.0):
        memory = LandmarkMemory(block_size=3, top_k=2, rotary_theta=None)
        key, value = torch.ones(1, 1, 30, 4), torch.randn(1, 1, 30, 4)
        key[:, :, 8] += better
        memory.append(key, value)
        query = torch.ones(1, 2, 1, 4)
        new = torch.full((1, 1, 1, 4), -9.0)
        out = attend_with_memory(memory, query, new, torch.zeros(1, 1, 1, 4))
        picked = [2, 9] if better else [8, 9]
        seen = [value[0, 0, 3 * n : 3 * n + 2].mean(0) for n in picked]
        gates = torch.tensor([4 + 4 * better, 4]).mul(0.5).softmax(0)
        wanted = gates[0] * seen[0] + gates[1] * seen[1]
        torch.testing.assert_close(out[0, :, 0], wanted.expand(2, 4))
    assert len(used) == 2


def test_extremes_stay_finite(used) -> None:
    for factor in (0.0, 1e3, 1e-20):
        sizes, options = (1, 4, 2, 16, 16, 5, 203), {"top_k": 3}
        memory, q, k, v = stream(sizes, options)
        memory = LandmarkMemory(block_size=5, **options)
        memory.append(k.repeat(1, 1, 20, 1) * factor, v.repeat(1, 1, 20, 1))
        out = attend_with_memory(memory, q[:, :, :1] * factor, k[:, :, :1], v[:, :, :1])
        assert torch.isfinite(out).all()
    assert len(used) == 3


def test_mapped_files_are_read_where_they_lie(tmp_path, used) -> None:
    options = {"top_k": 3, "capacity": 12, "path": tmp_path}
    memory, *tokens = stream((2, 4, 2, 20, 33, 5, 204), options)
    plain = memory.clone()
    new = [t[:, :, :1] for t in tokens]
    out = attend_with_memory(memory, *new)
    with disabled():
        assert_close(out, attend_with_memory(plain, *new), 1e-5)
    assert len(used) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_pytorch_form(dtype, used) -> None:
    memory = LandmarkMemory(block_size=4, top_k=2)
    for length in (30, 1):
        q, k, v = (torch.randn(1, 2, length, 8).to(dtype) for _ in range(3))
        assert attend_with_memory(memory, q, k, v).dtype == dtype
    assert not used


def test_generated_tokens_are_the_same(used) -> None:
    torch.manual_seed(4)
    config = LandmarkGPTConfig(
        vocab_size=53, landmark_id=52, embed_dim=40, num_layers=2, num_heads=2, freq=6,
        train_context=128,
    )  # fmt: skip
    model = LandmarkGPT(config).eval()
    prompt = torch.randint(52, (1, 200))
    tokens = [int(t) for t in model.generate(prompt, max_new_tokens=40, temperature=0)]
    assert len(used) >= 40
    with disabled():
        assert [int(t) for t in model.generate(prompt, max_new_tokens=40, temperature=0)] == tokens


@pytest.mark.parametrize("stop", [1, 9])
def test_flops_are_those_of_the_pytorch_form(stop) -> None:
    for sizes, options in STREAMS:
        memory, *tokens = stream(sizes, options)
        attend_with_memory(memory, *(t[:, :, : stop - 1] for t in tokens)) if stop > 1 else None
        new = [t[:, :, stop - 1 : stop] for t in tokens]
        plain = memory.clone()
        own = count_flops(lambda m=memory, n=new: attend_with_memory(m, *n))
        with disabled():
            assert own == count_flops(lambda m=plain, n=new: attend_with_memory(m, *n))


def test_the_operator_is_sound() -> None:
    memory, *tokens = stream((2, 4, 2, 20, 33, 5, 204), {"top_k": 3})
    args = []

    def op(*given):  # type: ignore[no-untyped-def]
        args.extend(given)
        return landmark_op(*given)

    landmark_op = landmark_native._op
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landmark_native, "_op", op)
        attend_with_memory(memory, *(t[:, :, :1] for t in tokens))
    torch.library.opcheck(landmark_op, tuple(args))
