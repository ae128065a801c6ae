"""Causal linear attention by chunks against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_close
from manyheads.choose.memory import largest_tensor_numel, peak_memory
from manyheads.layers import linear
from manyheads.layers.linear import causal_linear

NAMES = ("query", "key", "value", "state")


def definition(query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(query.shape[2]):
        state = state + key[:, :, t, :, None] * value[:, :, t, None, :]
        outputs.append((query[:, :, t, None] @ state).squeeze(-2))
    return torch.stack(outputs, 2), state


def draw(batch: int, heads: int, length: int, dim: int, value_dim: int, dtype=torch.float64):
    sizes = [(length, dim), (length, dim), (length, value_dim), (dim, value_dim)]
    return [torch.randn(batch, heads, *s, dtype=dtype, requires_grad=True) for s in sizes]


def compare(tensors: list[Tensor], expected_from: list[Tensor], limit: float, **options) -> None:
    out, final = causal_linear(*tensors, **options)
    wanted, wanted_final = definition(*expected_from)
    assert_close(out, wanted, limit, "out")
    assert_close(final, wanted_final, limit, "state")
    cot, cot_final = torch.randn_like(out), torch.randn_like(final)
    grads = torch.autograd.grad((out * cot).sum() + (final * cot_final).sum(), tensors)
    reference = torch.autograd.grad(
        (wanted * cot).sum() + (wanted_final * cot_final).sum(), expected_from
    )
    for name, a, e in zip(NAMES, grads, reference, strict=True):
        assert_close(a, e, limit, f"gradient of {name}")


@pytest.mark.parametrize("chunk_size", [1, 16, 63, 64, 500])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_recurrence(batch: int, chunk_size: int) -> None:
    tensors = draw(batch, 2, 63, 20, 12)
    compare(tensors, tensors, 1e-12, chunk_size=chunk_size)


def test_float32_is_close_to_float64() -> None:
    tensors = draw(1, 2, 63, 20, 12, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    compare(tensors, wide, 1e-6, chunk_size=16)


def test_tiles_over_batch_and_length_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(5, 2, 63, 20, 12)
    for numbers in (1, 2 * 2 * 16 * 20, 3 * 2 * 16 * 20):
        monkeypatch.setattr(linear, "_TILE_NUMBERS", numbers)
        compare(tensors, tensors, 1e-12, chunk_size=16)


def test_strided_inputs() -> None:
    tensors = draw(3, 2, 63, 20, 12)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(causal_linear(*strided), causal_linear(*tensors))


def test_without_a_state_it_starts_from_zero_and_changes_no_input() -> None:
    query, key, value, state = (t.detach() for t in draw(1, 2, 63, 20, 12))
    out, _ = causal_linear(query, key, value)
    assert_close(out, definition(query, key, value, torch.zeros_like(state))[0], 1e-12)
    copy = state.clone()
    causal_linear(query, key, value, state)
    assert torch.equal(state, copy)


def test_half_precision_is_summed_in_float32() -> None:
    tensors = [t.detach() for t in draw(1, 2, 63, 20, 12, torch.float32)][:3]
    halves = [t.bfloat16() for t in tensors]
    out, final = causal_linear(*halves)
    assert out.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    expected, state = causal_linear(*(t.float() for t in halves))
    assert torch.equal(out, expected.bfloat16())
    assert torch.equal(final, state)


def test_no_tokens() -> None:
    query, key, value, state = draw(3, 2, 0, 20, 12)
    out, final = causal_linear(query, key, value, state)
    assert out.shape == (3, 2, 0, 12)
    assert torch.equal(final, state)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 70), cut=st.integers(0, 70), chunk=st.integers(1, 80), seed=st.integers(0)
)
def test_any_split_gives_the_same(length: int, cut: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed % 2**32)
    query, key, value, state = (t.detach() for t in draw(1, 2, length, 5, 3))
    cut = min(cut, length)
    parts = [(t[:, :, :cut], t[:, :, cut:]) for t in (query, key, value)]
    first, middle = causal_linear(*(a for a, _ in parts), state, chunk_size=chunk)
    second, last = causal_linear(*(b for _, b in parts), middle, chunk_size=chunk)
    whole, final = causal_linear(query, key, value, state, chunk_size=chunk)
    torch.testing.assert_close(torch.cat((first, second), 2), whole)
    torch.testing.assert_close(last, final)


def test_memory_is_linear_and_small() -> None:
    query, key, value, _ = draw(1, 2, 1024, 32, 32, torch.float32)

    def both() -> None:
        out, _ = causal_linear(query, key, value)
        torch.autograd.grad(out.sum(), (query, key, value))

    # Scores of the chunks (2, 1024, 64) are the largest: neither (N, N) nor (N, D, V).
    assert largest_tensor_numel(both) <= 2 * 1024 * 64
    assert peak_memory(both).peak_bytes < 4 * query.numel() * 20
    with torch.no_grad():
        kept = peak_memory(lambda: causal_linear(query, key, value))
    assert kept.peak_bytes < 4 * query.numel() * 8


def test_it_compiles_in_one_graph() -> None:
    tensors = draw(1, 2, 63, 20, 12)
    compiled = torch.compile(causal_linear, fullgraph=True, backend="aot_eager")
    expected, actual = causal_linear(*tensors), compiled(*tensors)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual[0].sum() + actual[1].sum(), tensors)
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), tensors)
    torch.testing.assert_close(grads, wanted)


def test_the_operator_keeps_its_contract() -> None:
    tensors = draw(2, 2, 10, 4, 3)
    torch.library.opcheck(linear._forward_op, (*tensors, 4, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size 0"),
        ({"key": torch.zeros(1, 2, 8, 4)}, "one key for each query"),
        ({"value": torch.zeros(1, 3, 9, 4)}, "one value for each key"),
        ({"state": torch.zeros(1, 2, 4, 5)}, r"expected \(batch, heads, D, V\)"),
        ({"query": torch.zeros(2, 9, 4)}, "3 axes"),
    ],
)
def test_errors_name_what_is_wrong(change: dict, message: str) -> None:
    arguments = {n: torch.zeros(1, 2, 9, 4) for n in ("query", "key", "value")} | change
    with pytest.raises(ValueError, match=message):
        causal_linear(**arguments)
