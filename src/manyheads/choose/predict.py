"""What a call would take, from the closed forms and from what was measured at other lengths.

Predictions decide what is affordable before it is tried, and stand in for what is not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from manyheads.choose.grid import GridSubject
from manyheads.registry import Mechanism, Shape

__all__ = [
    "can_hold",
    "closed_peak_bytes",
    "extrapolate",
    "input_bytes",
    "largest_length",
    "need_bytes",
    "predict_peak_bytes",
    "predict_seconds",
    "state_bytes_closed",
    "work",
]

# Share of the matrix-product rate that is assumed while nothing is measured: low, so that the
# first guess is rather too slow than too fast.
_SHARE = 0.1
_CALL_SECONDS = 50e-6
# Forward and backward of matrix products: one product forward, two backward, scores again.
_TRAIN_WORK = 3.5
# Peaks differ from the closed form by scratch of the backward pass; unknown ones count fourfold.
_UNKNOWN_PEAK = 4.0
# What is left to the rest of the system.
_RESERVE = 512 << 20
_MARGIN = 1.5


def work(what: str, mechanism: Mechanism | GridSubject, shape: Shape) -> float:
    """Return a number that the time of forward, train or decode grows in proportion to."""
    if what == "decode":
        return float(max(mechanism.state_numbers(shape), 1))
    flops = max(mechanism.flops(shape), mechanism.bytes_moved(shape), 1)
    return flops * (_TRAIN_WORK if what == "train" else 1.0)


def extrapolate(
    known: Mapping[int, float], length: int, scale: Callable[[int], float]
) -> float | None:
    """Return the value at a length from values at others and the closed form of their growth.

    From one value: in proportion to the closed form. From two or more: the two nearest are taken
    as ``a + b * scale``, where a is what does not grow; if they grow faster than the closed form
    (the data left the cache), their own power of it is continued instead.
    """
    if not known or length in known:
        return known.get(length)
    nearest = sorted(known, key=lambda n: abs(math.log(n / length)))[:2]
    if len(nearest) == 1:
        return known[nearest[0]] * scale(length) / scale(nearest[0])
    low, high = sorted(nearest)
    w0, w1, t0, t1 = scale(low), scale(high), known[low], known[high]
    if w1 <= w0 or t1 <= t0:
        return known[nearest[0]]
    slope = (t1 - t0) / (w1 - w0)
    if t1 >= slope * w1:
        return max(t1 + slope * (scale(length) - w1), 0.0)
    power = min(math.log(t1 / t0) / math.log(w1 / w0), 1.5)
    return t1 * (scale(length) / w1) ** power


def predict_seconds(
    what: str,
    mechanism: Mechanism | GridSubject,
    shape: Shape,
    known: Mapping[int, float],
    *,
    rate: float,
) -> float:
    """Return the expected seconds of one call.

    Args:
        what: forward, train or decode.
        known: measured seconds of the same call at other lengths.
        rate: matrix-product FLOP/s of this machine.
    """
    guess = extrapolate(
        known, shape.length, lambda n: work(what, mechanism, replace(shape, length=n))
    )
    if guess is not None:
        return guess
    return _CALL_SECONDS + work(what, mechanism, shape) / (rate * _SHARE)


@lru_cache(maxsize=4096)
def input_bytes(mechanism: Mechanism | GridSubject, shape: Shape, element_bytes: int = 4) -> int:
    """Return the bytes of the function's inputs, without making them."""
    with torch.device("meta"):
        inputs = mechanism.inputs(shape, None)
    return sum(
        t.numel() * (element_bytes if t.is_floating_point() else t.element_size())
        for t in inputs.values()
    )


def closed_peak_bytes(
    what: str, mechanism: Mechanism | GridSubject, shape: Shape, element_bytes: int = 4
) -> int:
    """Return the closed form of the peak above the inputs; the inside is float32 at least.

    Of training it is the least: gradients of the inputs, and half of what the forward pass held
    once more (backward passes that make their tiles again hold no more than that).
    """
    numbers = mechanism.memory_numbers(shape) * max(element_bytes, 4)
    if what != "train":
        return numbers
    return numbers * 3 // 2 + input_bytes(mechanism, shape, element_bytes)


def predict_peak_bytes(
    what: str,
    mechanism: Mechanism | GridSubject,
    shape: Shape,
    known: Mapping[int, int],
    element_bytes: int = 4,
) -> int:
    """Return the expected peak above the inputs.

    Args:
        what: forward or train.
        known: measured peaks of the same call at other lengths.
    """

    def closed(length: int) -> float:
        return closed_peak_bytes(what, mechanism, replace(shape, length=length), element_bytes)

    guess = extrapolate({n: float(b) for n, b in known.items()}, shape.length, closed)
    return int(_UNKNOWN_PEAK * closed(shape.length) if guess is None else guess)


def state_bytes_closed(
    mechanism: Mechanism | GridSubject, shape: Shape, element_bytes: int = 4
) -> int:
    """Return the closed form of the state's bytes; states of constant size are float32 at least."""
    wide = max(element_bytes, 4) if mechanism.constant_state else element_bytes
    return mechanism.state_numbers(shape) * wide


def need_bytes(
    what: str,
    mechanism: Mechanism | GridSubject,
    shape: Shape,
    known: Mapping[int, int] | None,
    element_bytes: int = 4,
) -> int:
    """Return the memory that a measurement needs in all: inputs, peak, the incoming gradient.

    Args:
        known: measured peaks at other lengths; None: the closed form as it is, which is the least
            that can be needed.
    """
    if what == "decode":
        # Inputs that fill the cache, the cache, and the one twice as long that it moves into.
        return 6 * state_bytes_closed(mechanism, shape, element_bytes)
    inputs = input_bytes(mechanism, shape, element_bytes)
    if known is None:
        peak = closed_peak_bytes(what, mechanism, shape, element_bytes)
    else:
        peak = predict_peak_bytes(what, mechanism, shape, known, element_bytes)
    output = shape.batch * shape.heads * shape.length * shape.dv * element_bytes
    return inputs + peak + (output if what == "train" else 0)


def can_hold(need: int, available: int) -> bool:
    """Return whether so much may be allocated: with a margin, and leaving some to the system."""
    return need * _MARGIN + min(_RESERVE, available // 8) <= available


def largest_length(fits: Callable[[int], bool], below: int) -> int:
    """Return the largest length under ``below`` that fits, 0 if none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
