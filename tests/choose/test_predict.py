"""Predictions: exact where the closed form is, sane where the machine has its say."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.choose.cost import Subject
from manyheads.choose.predict import (
    can_hold,
    extrapolate,
    input_bytes,
    largest_length,
    need_bytes,
    predict_peak_bytes,
    predict_seconds,
    state_bytes_closed,
)
from manyheads.choose.timing import interleaved
from manyheads.registry import Shape, get_mechanism, list_mechanisms

SHAPE = Shape(heads=2, head_dim=16)
WIDE = Shape(heads=4, head_dim=64)


@given(
    a=st.floats(0, 1), b=st.floats(1e-6, 1), power=st.sampled_from([1, 2]), far=st.integers(3, 50)
)
def test_a_constant_and_a_closed_form_are_found_exactly(a, b, power, far) -> None:
    def true(n: int) -> float:
        return a + b * n**power

    known = {n: true(n) for n in (100, 200)}
    guess = extrapolate(known, 100 * far, lambda n: float(n**power))
    assert guess == pytest.approx(true(100 * far), rel=1e-6)


def test_what_is_known_is_returned() -> None:
    assert extrapolate({10: 3.0, 20: 5.0, 40: 1.0}, 20, float) == 5.0
    assert extrapolate({}, 20, float) is None


def test_one_point_goes_in_proportion() -> None:
    assert extrapolate({10: 3.0}, 40, lambda n: n**2.0) == 48.0


def test_faster_growth_than_the_closed_form_goes_on() -> None:
    known = {100: 1.0, 200: 3.0}
    guess = extrapolate(known, 400, float)
    assert 6.0 < guess <= 9.0 + 1e-9


def test_noise_that_falls_does_not_go_below_what_was_seen() -> None:
    assert extrapolate({100: 2.0, 200: 1.0}, 400, float) == 1.0


@pytest.mark.parametrize("name", ["gla", "softmax"])
def test_predicted_time_is_of_the_measured_size(name) -> None:
    mechanism = get_mechanism(name)
    calls = {n: Subject(name, replace(SHAPE, length=n)).call("train") for n in (256, 512, 1024)}
    times = interleaved({str(n): c for n, c in calls.items()}, repeats=21)
    # The fastest of the rounds: what others do on this machine does not belong to the question.
    best = {n: min(times[str(n)].samples) for n in calls}
    known = {n: best[n] for n in (256, 512)}
    guess = predict_seconds("train", mechanism, replace(SHAPE, length=1024), known, rate=1e10)
    assert 1 / 3 < guess / best[1024] < 3


@pytest.mark.parametrize("name", list_mechanisms())
@pytest.mark.parametrize("what", ["forward", "train"])
def test_predicted_peak_is_near_the_measured(name, what) -> None:
    causal = get_mechanism(name).causal
    known = {}
    for n in (512, 1024, 2048):
        subject = Subject(name, replace(WIDE, length=n, is_causal=causal))
        known[n] = subject.peak(what)["peak_bytes"]
    measured = known.pop(2048)
    guess = predict_peak_bytes(what, subject.mechanism, subject.shape, known)
    assert 0.7 < guess / measured < 1.6


@pytest.mark.parametrize("name", list_mechanisms())
def test_what_is_needed_at_least_is_no_more_than_is_taken(name) -> None:
    """The error before any work must not refuse what would have fitted."""
    causal = get_mechanism(name).causal
    subject = Subject(name, replace(WIDE, length=2048, is_causal=causal))
    taken = subject.peak("train")["peak_bytes"] + input_bytes(subject.mechanism, subject.shape)
    taken += 4 * WIDE.batch * WIDE.heads * 2048 * WIDE.dv  # the incoming gradient is there before
    least = need_bytes("train", subject.mechanism, subject.shape, None)
    assert least < 1.3 * taken


@pytest.mark.parametrize("name", list_mechanisms())
def test_inputs_are_sized_without_making_them(name) -> None:
    mechanism = get_mechanism(name)
    shape = replace(SHAPE, length=100, is_causal=mechanism.causal)
    made = sum(t.nbytes for t in Subject(name, shape).inputs.values())
    assert input_bytes(mechanism, shape) == made
    assert input_bytes(mechanism, replace(shape, length=10**9)) > 10**9


@pytest.mark.parametrize("name", [n for n in list_mechanisms() if get_mechanism(n).step])
def test_closed_state_is_the_measured_one(name) -> None:
    subject = Subject(name, replace(SHAPE, length=100))
    closed = state_bytes_closed(subject.mechanism, subject.shape)
    assert closed == pytest.approx(subject.state_bytes(), rel=0.02)


def test_some_memory_is_left_to_the_system() -> None:
    assert can_hold(10**9, 10**10)
    assert not can_hold(10**9, 10**9)
    assert not can_hold(9 * 10**8, 10**9)


@given(limit=st.integers(0, 10_000))
def test_largest_length(limit) -> None:
    assert largest_length(lambda n: n <= limit, 10_001) == limit


@pytest.mark.parametrize("name", list_mechanisms())
def test_closed_forms_answer_at_once_for_any_length(name) -> None:
    """A closed form that enumerates what it counts takes the memory of whoever asks."""
    mechanism = get_mechanism(name)
    shape = Shape(length=10**12, is_causal=mechanism.causal)
    tracemalloc.start()
    for form in ("flops", "bytes_moved", "state_numbers", "memory_numbers"):
        count = getattr(mechanism, form)(shape)
        # What does not decode holds no state.
        assert count > 0 or (form == "state_numbers" and mechanism.step is None and count == 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
