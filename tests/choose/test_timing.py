"""The timing protocol on a clock that the tests move, and growth on known curves."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from manyheads.choose import timing
from manyheads.choose.timing import (
    Timing,
    crossover,
    fit_exponent,
    forward,
    forward_backward,
    interleaved,
)

torch.set_num_threads(1)


class Clock:
    """A clock that stands still unless a callable made by :meth:`work` runs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """A callable whose runs take these seconds in turn, the last of them for ever after."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_rounds_interleave_and_rotate(clock: Clock) -> None:
    calls = {name: clock.work(name, 1.0) for name in "abc"}
    timings = interleaved(calls, repeats=4, warmup=2)
    assert "".join(clock.order) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(t.repeats == 4 and t.calls == 1 for t in timings.values())
    assert timings.stopped == "repeats"


def test_figures_are_median_and_quartiles_without_the_warm_up(clock: Clock) -> None:
    samples = [3.0, 1.0, 2.0, 10.0, 5.0]
    timings = interleaved({"a": clock.work("a", 99.0, *samples)}, repeats=5)
    got = timings["a"]
    assert got.samples == pytest.approx(samples)
    assert [got.lower, got.median, got.upper] == pytest.approx(
        list(np.percentile(samples, [25, 50, 75]))
    )
    assert got.spread == pytest.approx((got.upper - got.lower) / got.median)
    assert got.to_dict()["samples"] == pytest.approx(samples)


def test_budget_stops_early_but_not_below_three(clock: Clock) -> None:
    calls = {"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)}
    tiny = interleaved(calls, repeats=50, budget_seconds=0.5)
    assert tiny.stopped == "budget"
    assert {t.repeats for t in tiny.values()} == {3}
    # Two calls of warm-up and two a round: 2 + 2 * 9 = 20 fit, the tenth round would not.
    roomy = interleaved(calls, repeats=50, budget_seconds=20.5)
    assert {t.repeats for t in roomy.values()} == {9}
    assert interleaved(calls, repeats=4, budget_seconds=1e6).stopped == "repeats"


def test_short_calls_are_repeated_within_a_sample(clock: Clock) -> None:
    timings = interleaved(
        {"short": clock.work("short", 0.5, 1e-4), "long": clock.work("long", 1.0)},
        repeats=3,
        warmup=2,
        min_sample_seconds=1e-3,
    )
    assert (timings["short"].calls, timings["long"].calls) == (10, 1)
    assert timings["short"].median == pytest.approx(1e-4)
    assert clock.order.count("long") == 2 + 3


@pytest.mark.parametrize("after", [0, 3, 6, 8, 11])
def test_interrupt_keeps_what_was_measured(clock: Clock, after: int) -> None:
    def interrupting(name: str) -> Callable[[], None]:
        work = clock.work(name, 1.0)

        def call() -> None:
            if len(clock.order) == after:
                raise KeyboardInterrupt
            work()

        return call

    timings = interleaved({n: interrupting(n) for n in "abc"}, repeats=5)
    assert timings.stopped == "interrupt"
    assert sum(t.repeats for t in timings.values()) == max(after - 3, 0)
    assert list(timings) == sorted(timings)
    assert gc.isenabled()


def test_progress_reaches_its_total(clock: Clock) -> None:
    seen: list[tuple[int, int]] = []
    calls = {n: clock.work(n, 1.0) for n in "ab"}
    interleaved(calls, repeats=3, progress=lambda *p: seen.append(p))
    assert seen == [(i, 8) for i in range(1, 9)]
    seen.clear()
    interleaved(calls, repeats=9, budget_seconds=1.0, progress=lambda *p: seen.append(p))
    assert seen[-1] == (20, 20)
    assert len(seen) == 2 + 6 + 1


def test_collector_is_off_while_timing_and_restored() -> None:
    states: list[bool] = []
    gc.unfreeze()
    interleaved({"a": lambda: states.append(gc.isenabled())}, repeats=3, min_sample_seconds=1e-9)
    assert not any(states)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        interleaved({"a": lambda: None}, repeats=3)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_in_a_callable_is_passed_on_and_the_collector_restored() -> None:
    def fail() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        interleaved({"a": fail})
    assert gc.isenabled()


def test_bad_protocols_are_named() -> None:
    for options, message in (
        ({"repeats": 2}, "repeats 2 is less than 3"),
        ({"warmup": -1}, "warmup -1 is negative"),
        ({"budget_seconds": 0.0}, "budget_seconds 0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            interleaved({"a": lambda: None}, **options)  # type: ignore[arg-type]


def test_real_work_keeps_its_order() -> None:
    small, large = torch.randn(16, 16), torch.randn(512, 512)
    timings = interleaved({"small": lambda: small @ small, "large": lambda: large @ large})
    assert timings["small"].median < timings["large"].median  # a factor of thousands in work
    assert timings["small"].calls > 1


def test_overlap_tells_whether_two_can_be_told_apart() -> None:
    a, b, c = Timing.of([1, 2, 3]), Timing.of([2, 3, 4]), Timing.of([7, 8, 9])
    assert a.overlaps(b)
    assert b.overlaps(a)
    assert not a.overlaps(c)
    assert not c.overlaps(a)


def test_forward_records_no_gradient() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5, requires_grad=True)
    out = forward(layer, x)()
    assert out.shape == (3, 7)
    assert not out.requires_grad


def test_forward_backward_runs_every_gradient_and_leaves_grad_alone() -> None:
    seen: list[str] = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append("forward")
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            seen.append("backward")
            return grad

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor, *, rest: list[Tensor], mask: Tensor) -> tuple[Any, ...]:
            return Square.apply(x) * self.weight, {"more": Square.apply(rest[0])}, mask

    module = Module()
    x, rest = torch.randn(3, 5), [torch.randn(2)]
    call = forward_backward(module, x, rest=rest, mask=torch.ones(3, dtype=torch.bool))
    assert seen == ["forward"] * 2
    seen.clear()
    call()
    call()
    assert seen == ["forward", "forward", "backward", "backward"] * 2
    assert module.weight.grad is None
    assert x.grad is None
    assert not x.requires_grad


def test_forward_backward_takes_gradients_of_parameters() -> None:
    layer = nn.Linear(5, 7)
    index = torch.arange(3)
    embedding = nn.Embedding(4, 5)
    from manyheads.choose.flops import count_flops

    assert count_flops(forward_backward(layer, torch.randn(3, 5))).total == 3 * 2 * 3 * 5 * 7
    forward_backward(embedding, index)()
    with pytest.raises(ValueError, match="there is no backward to time"):
        forward_backward(torch.sign, index)


def test_forward_backward_keeps_lower_precision_and_named_tuples() -> None:
    from collections import namedtuple

    State = namedtuple("State", "a b")
    state = State(torch.randn(4, 4, dtype=torch.bfloat16), None)
    call = forward_backward(lambda s: s.a @ s.a, state)
    call()
    assert not state.a.requires_grad


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.floats(-1, 3), scale=st.floats(1e-9, 1e3), lengths=st.sets(st.integers(1, 10**6))
)
def test_exponent_of_a_power(exponent: float, scale: float, lengths: set[int]) -> None:
    ordered = sorted(lengths | {7, 4096})
    fitted, r2 = fit_exponent(ordered, [scale * n**exponent for n in ordered])
    assert fitted == pytest.approx(exponent, abs=1e-6)
    assert r2 == pytest.approx(1.0, abs=1e-3) or abs(exponent) < 1e-6


def test_exponent_with_noise_is_the_least_squares_line() -> None:
    lengths, seconds = [256, 512, 1024, 2048, 4096], [1.0, 2.3, 3.7, 9.1, 15.0]
    slope, intercept = np.polyfit(np.log(lengths), np.log(seconds), 1)
    fitted = slope * np.log(lengths) + intercept
    rest = np.sum((np.log(seconds) - fitted) ** 2)
    whole = np.sum((np.log(seconds) - np.log(seconds).mean()) ** 2)
    assert fit_exponent(lengths, seconds) == pytest.approx((slope, 1 - rest / whole))
    assert fit_exponent([1, 2, 3], [5.0, 5.0, 5.0]) == (0.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(cross=st.floats(300, 30_000), p=st.floats(0.5, 1.2), q=st.floats(1.5, 2.5))
def test_crossover_of_two_powers(cross: float, p: float, q: float) -> None:
    lengths = [256 * 2**i for i in range(8)]
    a = [(n / cross) ** p for n in lengths]
    b = [(n / cross) ** q for n in lengths]
    assert crossover(lengths, a, b) == pytest.approx(cross, rel=1e-6)
    assert crossover(lengths[::-1], a[::-1], b[::-1]) == pytest.approx(cross, rel=1e-6)
    assert crossover(lengths, b, a) is None


def test_crossover_must_last() -> None:
    lengths = [1, 2, 4, 8]
    assert crossover(lengths, [1, 1, 1, 1], [2, 2, 2, 2]) == 1.0  # from the start
    assert crossover(lengths, [1, 1, 1, 3], [2, 2, 2, 2]) is None  # lost again
    back = crossover(lengths, [1, 3, 1, 1], [2, 2, 2, 2])  # won, lost, won for good
    assert back is not None
    assert 2 < back < 4
    assert back == pytest.approx(2 * 2 ** (math.log(1.5) / math.log(3)))
    assert crossover(lengths, [2, 2, 2, 1], [2, 2, 2, 2]) == pytest.approx(4.0)  # ties are not wins
    assert crossover([5], [1], [2]) == pytest.approx(5.0)


def test_curves_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="needs two different ones"):
        fit_exponent([8, 8], [1.0, 2.0])
    with pytest.raises(ValueError, match="3 lengths but 2 seconds"):
        fit_exponent([1, 2, 3], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"seconds has 0\.0"):
        fit_exponent([1, 2], [0.0, 1.0])
    with pytest.raises(ValueError, match="must be different"):
        crossover([1, 1], [1, 2], [1, 2])
    with pytest.raises(ValueError, match="b_seconds has nan"):
        crossover([1, 2], [1, 2], [1, math.nan])
