"""Fair timing: interleaved rounds, medians with spread.

A machine is never quiet. Callables that are compared run one after another within a round and
each round starts with another one, so that a slow second hits all of them alike; the median and
quartiles over the rounds are what is reported.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from manyheads.choose.dispatch import tensors_in
from manyheads.choose.growth import crossover, fit_exponent

__all__ = [
    "Timing",
    "Timings",
    "crossover",
    "fit_exponent",
    "forward",
    "forward_backward",
    "interleaved",
]

MIN_SAMPLES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds per call of one callable.

    Attributes:
        median, lower, upper: median and quartiles of the samples, in seconds.
        samples: seconds per call of each round.
        calls: calls per sample; more than one where a call is too short for the clock.
    """

    median: float
    lower: float
    upper: float
    samples: tuple[float, ...]
    calls: int = 1

    @classmethod
    def of(cls, samples: Sequence[float], *, calls: int = 1) -> Timing:
        """Summarise samples (at least one)."""
        lower, middle, upper = _quartiles(samples)
        return cls(median=middle, lower=lower, upper=upper, samples=tuple(samples), calls=calls)

    @property
    def repeats(self) -> int:
        """Number of samples."""
        return len(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median: 0.1 is ten per cent."""
        return (self.upper - self.lower) / self.median if self.median else 0.0

    def overlaps(self, other: Timing) -> bool:
        """Return whether the quartile ranges overlap: the two cannot be told apart."""
        return self.lower <= other.upper and other.lower <= self.upper

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "samples": list(self.samples), "spread": self.spread}


class Timings(dict[str, Timing]):
    """Timing by name, and why measuring stopped.

    Attributes:
        stopped: ``"repeats"`` (all were done), ``"budget"`` or ``"interrupt"``; after an
            interrupt a callable may have fewer samples than others, or be missing.
    """

    stopped: Literal["repeats", "budget", "interrupt"] = "repeats"


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    budget_seconds: float | None = None,
    min_sample_seconds: float = 1e-3,
    progress: Callable[[int, int], None] | None = None,
) -> Timings:
    """Time callables against each other in rounds.

    Each is first called ``warmup`` times (at least once). Then each round times all of them
    once, starting one further along than the round before. Garbage is collected before, and
    collection is off while the clock runs.

    Args:
        calls: name to a callable without arguments; what it returns is dropped.
        repeats: rounds, at least 3.
        warmup: calls of each before the first round.
        budget_seconds: no round begins that would likely end after this many seconds, warm-up
            included, once there are 3 samples of each.
        min_sample_seconds: a call shorter than this is repeated within a sample.
        progress: called as ``progress(done, total)`` after each warm-up and each sample; after
            a stop by budget, once more with ``done == total``.

    Returns:
        The timings in the order of ``calls``. Ctrl-C ends the measurement and keeps what there
        is; see `Timings.stopped`.

    Raises:
        ValueError: fewer than 3 repeats, a negative warm-up, or a budget that is not positive.
    """
    if repeats < MIN_SAMPLES:
        raise ValueError(f"repeats {repeats} is less than {MIN_SAMPLES}, too few for a spread")
    if warmup < 0:
        raise ValueError(f"warmup {warmup} is negative: give 0 or more calls")
    if budget_seconds is not None and budget_seconds <= 0:
        raise ValueError(f"budget_seconds {budget_seconds} must be positive, or None for no limit")
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    numbers = dict.fromkeys(names, 1)
    total = len(names) * (repeats + 1)
    done = 0

    def report(count: int) -> None:
        if progress is not None:
            progress(count, total)

    start = time.perf_counter()
    timings = Timings()
    try:
        with _quiet_collector():
            for name in names:
                numbers[name] = _warm_up(calls[name], warmup, min_sample_seconds)
                done += 1
                report(done)
            rounds_start = time.perf_counter()
            for index in range(repeats):
                if index >= MIN_SAMPLES and budget_seconds is not None:
                    now = time.perf_counter()
                    if now - start + (now - rounds_start) / index > budget_seconds:
                        timings.stopped = "budget"
                        report(total)
                        break
                for name in _rotated(names, index):
                    seconds = _sample(calls[name], numbers[name])
                    samples[name].append(seconds / numbers[name])
                    done += 1
                    report(done)
                gc.collect()
    except KeyboardInterrupt:
        timings.stopped = "interrupt"
    for name in names:
        if samples[name]:
            timings[name] = Timing.of(samples[name], calls=numbers[name])
    return timings


def _warm_up(call: Callable[[], object], times: int, min_sample_seconds: float) -> int:
    # The last warm call says how many calls make a sample long enough for the clock.
    for _ in range(max(times, 1) - 1):
        call()
    seconds = _sample(call, 1)
    if seconds < 100 * min_sample_seconds:
        # First calls are slow: decide by the best of three.
        seconds = min(seconds, _sample(call, 1), _sample(call, 1))
    return max(1, math.ceil(min_sample_seconds / max(seconds, 1e-9)))


def _sample(call: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    return time.perf_counter() - begin


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(len(names), 1)
    return names[by:] + names[:by]


@contextmanager
def _quiet_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    # Frozen objects are not looked at again, so the collections between rounds are short.
    freeze = gc.get_freeze_count() == 0
    if freeze:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if enabled:
            gc.enable()


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return at(0.25), median(ordered), at(0.75)


def forward(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """Return a callable that runs ``fn`` on these arguments without recording gradients."""

    def call() -> Any:
        with torch.no_grad():
            return fn(*args, **kwargs)

    return call


def forward_backward(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], None]:
    """Return a callable that runs ``fn`` and the gradients of all that it returns.

    Gradients are taken for every floating-point tensor among the arguments and, if ``fn`` is a
    module, for its trainable parameters; ``.grad`` is left alone. The incoming gradients are
    fixed random tensors, made here by running ``fn`` once.

    Raises:
        ValueError: nothing that ``fn`` returns depends on a tensor that can have a gradient.
    """
    args, kwargs = _as_leaves(args), _as_leaves(kwargs)
    sources = [t for t in tensors_in(args, kwargs) if t.requires_grad]
    if isinstance(fn, nn.Module):
        sources += [p for p in fn.parameters() if p.requires_grad]

    def outputs() -> list[Tensor]:
        with torch.enable_grad():
            return [t for t in tensors_in(fn(*args, **kwargs)) if t.requires_grad]

    generator = torch.Generator().manual_seed(0)
    grads = [
        torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in outputs()
    ]
    if not grads or not sources:
        raise ValueError(
            "no output depends on a floating-point input or parameter: there is no backward to time"
        )

    def call() -> None:
        torch.autograd.grad(outputs(), sources, grads, allow_unused=True)

    return call


def _as_leaves(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        leaf = tree.detach()
        return leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_as_leaves(t) for t in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(_as_leaves(t) for t in tree)
    if isinstance(tree, dict):
        return {k: _as_leaves(v) for k, v in tree.items()}
    return tree
