"""The cost stage: what to measure next, whether it is affordable, and the measuring.

Lengths ascend, so that every length is foreseen from shorter ones: what would exceed the memory
or what is left of the time is predicted instead, and says so. At one length the mechanisms take
turns (see `timing.interleaved`).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Literal

from manyheads.choose.cost import Subject, TensorPool
from manyheads.choose.grid import GridSubject
from manyheads.choose.machine import available_memory, matmul_rate
from manyheads.choose.predict import (
    can_hold,
    need_bytes,
    predict_peak_bytes,
    predict_seconds,
    state_bytes_closed,
)
from manyheads.choose.results import Progress, Results, Unit
from manyheads.choose.rows import cost_rows, known, measures, summaries, unit_key
from manyheads.choose.timing import MIN_SAMPLES, interleaved
from manyheads.choose.units import show_bytes, show_seconds

__all__ = ["measure_cost"]

_ROUNDS = 11
_MIN_SAMPLE_SECONDS = 2e-3
_HELD_BACK = 1.33
# Calls that a measurement makes at least, in times of one call: to set up, warm up, three rounds.
_LEAST_CALLS = {"memory": 2.5, "forward": 5.0, "train": 5.5, "decode": 8.0}


def measure_cost(results: Results, *, seconds: float, progress: Progress | None = None) -> None:
    """Measure the cost units that are missing, then make the rows.

    Args:
        seconds: for all cost units, those of earlier sessions included.
        progress: told the share that is done, 0 to 1.

    Raises:
        KeyboardInterrupt: after the units that were complete are kept.
    """
    stage = _Stage(results, seconds, progress or (lambda share, text: None))
    units = len(results.units)
    # What is there already need not be looked at before every group of timings.
    frozen = gc.get_freeze_count() == 0
    gc.collect()
    if frozen:
        gc.freeze()
    try:
        for length in results.workload.ladder:
            stage.measure_at(length)
        if len(results.units) > units:
            # Once more: whatever slowed the machine down before may be over.
            again = matmul_rate(results.workload.torch_dtype, seconds=0.25)
            results.machine["matmul_flops"] = max(again, results.machine["matmul_flops"])
    finally:
        if frozen:
            gc.unfreeze()
        results.cost = cost_rows(results)
        results.summary = summaries(results)
        results.save()


class _Stage:
    def __init__(self, results: Results, seconds: float, progress: Progress) -> None:
        self.results, self.seconds, self._tell = results, seconds, progress
        self.workload = results.workload
        self.measures = measures(self.workload.does)
        self.rate: float = results.machine["matmul_flops"]
        self.peak_of = "train" if "train" in self.measures else "forward"
        self._subjects: dict[str, Subject] = {}
        self._pool = TensorPool()
        self._shown = self._coming = self._setup = 0.0

    # What is to be done, and what it takes.

    def _pending(self, what: str, length: int) -> list[str]:
        return [
            name
            for name in self.workload.mechanisms
            if not self.results.has(unit_key(what, name, length))
        ]

    def _call_seconds(self, what: str, name: str, length: int) -> float:
        times = known(self.results, what, name)
        mechanism, shape = self.workload.subject(name), self.workload.shape(length)
        if not times and what == "train" and (forward := known(self.results, "forward", name)):
            return 3.5 * predict_seconds("forward", mechanism, shape, forward, rate=self.rate)
        return predict_seconds(what, mechanism, shape, times, rate=self.rate)

    def _least_seconds(self, what: str, name: str, length: int) -> float:
        call = self.peak_of if what == "memory" else what
        least = _LEAST_CALLS[what] * self._call_seconds(call, name, length)
        return least if what == "memory" else max(least, (MIN_SAMPLES + 2) * _MIN_SAMPLE_SECONDS)

    @property
    def left(self) -> float:
        return self.seconds - self.results.spent("cost/")

    def _plan(self) -> dict[tuple[str, int], dict[str, float]]:
        """Return the least seconds of every pending unit that the time allows for.

        Where all of them are too much, the most expensive are left out until the rest fits.
        """
        costs = {
            (what, length, name): self._least_seconds(what, name, length)
            for length in self.workload.ladder
            for what in self.measures
            for name in self._pending(what, length)
        }
        total = sum(costs.values())
        for unit in sorted(costs, key=lambda u: costs[u], reverse=True):
            if total <= self.left:
                break
            total -= costs.pop(unit)
        plan: dict[tuple[str, int], dict[str, float]] = {}
        for (what, length, name), cost in costs.items():
            plan.setdefault((what, length), {})[name] = cost
        return plan

    # Measuring.

    def measure_at(self, length: int) -> None:
        """Measure everything that is pending at a length."""
        for what in self.measures:
            pending = self._pending(what, length)
            if not pending:
                continue
            affordable = self._plan().get((what, length), {})
            for name in pending:
                if name not in affordable:
                    reason = self._too_slow(what, name, length)
                    self._give_up(what, name, length, reason, cause="time")
            rest = [name for name in pending if name in affordable]
            while rest:
                rest = self._wave(what, length, rest)
        self._release()

    def _wave(self, what: str, length: int, names: list[str]) -> list[str]:
        """Measure those that fit the memory together; returns the ones left for another wave."""
        together: list[str] = []
        later: list[str] = []
        for name in names:
            need, available = self._need(what, name, length), available_memory()
            if can_hold(need, available):
                together.append(name)
                if what == "memory":
                    self._measure_memory(name, length)
                elif not self._prepare(what, name, length):
                    together.remove(name)
            elif self._subjects or together:
                later.append(name)
            else:
                reason = (
                    f"needs about {show_bytes(need)} of memory, {show_bytes(available)} are free"
                )
                self._give_up(what, name, length, reason, cause="memory")
        if what != "memory" and together:
            self._measure_times(what, length, together)
        if later:
            self._release()
        return later

    def _need(self, what: str, name: str, length: int) -> int:
        w = self.workload
        mechanism, shape = w.subject(name), w.shape(length)
        call = self.peak_of if what == "memory" else what
        peaks = known(self.results, "memory", name, "peak_bytes") if call == self.peak_of else {}
        if call == "forward" and self.peak_of == "train":
            # A forward pass alone needs no more than one with backward.
            call, peaks = "train", known(self.results, "memory", name, "peak_bytes")
        need = need_bytes(call, mechanism, shape, peaks, w.element_bytes)
        if what == "memory" and mechanism.update is not None and w.causal:
            need = max(need, need_bytes("decode", mechanism, shape, {}, w.element_bytes))
        return need

    def _subject(self, name: str, length: int) -> Subject:
        if name not in self._subjects:
            w = self.workload
            what = name if w.grid is None else GridSubject(name, w.grid)
            self._subjects[name] = Subject(
                what, w.shape(length), dtype=w.torch_dtype, seed=w.seed, pool=self._pool
            )
        return self._subjects[name]

    def _release(self) -> None:
        self._subjects.clear()
        self._pool.clear()

    def _prepare(self, what: str, name: str, length: int) -> bool:
        begin = time.perf_counter()
        try:
            self._subject(name, length).call(what)
        except Exception as error:
            self._fail(what, name, length, error, time.perf_counter() - begin)
            return False
        self._setup += time.perf_counter() - begin
        return True

    def _measure_memory(self, name: str, length: int) -> None:
        self._foresee()
        self._show(f"{name}: memory at {self.workload.where(length)}", 0.0)
        begin = time.perf_counter()
        try:
            subject = self._subject(name, length)
            figures = subject.peak(self.peak_of)
            figures["state_bytes"] = subject.state_bytes()
            if length == self.workload.ladder[0]:
                figures["counted_flops"] = subject.counted_flops()
                figures["flops"] = subject.mechanism.flops(subject.shape)
        except Exception as error:
            self._fail("memory", name, length, error, time.perf_counter() - begin)
            return
        self.results.put(
            Unit(
                key=unit_key("memory", name, length),
                status="measured",
                figures=figures,
                seconds=time.perf_counter() - begin,
            )
        )

    def _measure_times(self, what: str, length: int, names: list[str]) -> None:
        text = f"{_WORDS[what]} at {self.workload.where(length)}"
        self._foresee()
        self._show(text, 0.0)
        begin, self._setup = time.perf_counter() - self._setup, 0.0
        calls = {n: _Guarded(self._subject(n, length).call(what)) for n in names}
        timings = interleaved(
            calls,
            repeats=_ROUNDS,
            budget_seconds=self._allowance(what, length, names),
            min_sample_seconds=_MIN_SAMPLE_SECONDS,
            progress=lambda done, total: self._show(text, time.perf_counter() - begin),
        )
        wall = time.perf_counter() - begin
        whole = sum(t.median * t.calls for t in timings.values()) or 1.0
        for name, timing in timings.items():
            seconds = wall * timing.median * timing.calls / whole
            if (error := calls[name].error) is not None:
                self._fail(what, name, length, error, seconds)
            elif timing.repeats >= MIN_SAMPLES:
                self.results.put(
                    Unit(
                        key=unit_key(what, name, length),
                        status="measured",
                        figures=timing.to_dict(),
                        seconds=seconds,
                    )
                )
        if timings.stopped == "interrupt":
            raise KeyboardInterrupt

    def _allowance(self, what: str, length: int, names: list[str]) -> float:
        """Return the least that a group needs and its part of the time that is to spare.

        What is still to come usually takes longer than foreseen, so a third is held back.
        """
        plan = self._plan()
        own = sum(plan.get((what, length), {}).get(n, 0.0) for n in names)
        whole = sum(cost for costs in plan.values() for cost in costs.values())
        spare = max(self.left - _HELD_BACK * whole, 0.0)
        return max(own + spare * own / whole if whole else 0.0, 1e-3)

    # What is not measured.

    def _give_up(
        self,
        what: str,
        name: str,
        length: int,
        reason: str,
        *,
        cause: Literal["time", "memory"],
    ) -> None:
        w = self.workload
        mechanism, shape = w.subject(name), w.shape(length)
        if what == "memory":
            peaks = known(self.results, "memory", name, "peak_bytes")
            figures: dict[str, Any] = {
                "peak_bytes": predict_peak_bytes(
                    self.peak_of, mechanism, shape, peaks, w.element_bytes
                ),
            }
            if mechanism.update is not None and w.causal:
                figures["state_bytes"] = state_bytes_closed(mechanism, shape, w.element_bytes)
        else:
            figures = {"median": self._call_seconds(what, name, length)}
        key = unit_key(what, name, length)
        self.results.put(
            Unit(key=key, status="predicted", figures=figures, reason=reason, cause=cause)
        )

    def _too_slow(self, what: str, name: str, length: int) -> str:
        least = self._least_seconds(what, name, length)
        if self.left <= 0:
            return "the time for costs is used up: raise --budget"
        return (
            f"takes about {show_seconds(least)} to measure, {show_seconds(self.left)} are left "
            "for all costs: raise --budget"
        )

    def _fail(
        self, what: str, name: str, length: int, error: BaseException, seconds: float
    ) -> None:
        text = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {text[0] if text else 'no message'}"
        cause: Literal["memory", "error"] = "error"
        if isinstance(error, MemoryError) or "allocate memory" in reason:
            reason, cause = "the system refused the memory for it", "memory"
        key = unit_key(what, name, length)
        self.results.put(
            Unit(key=key, status="failed", seconds=seconds, reason=reason, cause=cause)
        )

    def _foresee(self) -> None:
        least = sum(c for costs in self._plan().values() for c in costs.values())
        self._coming = min(2.0 * least, max(self.left, 0.0))

    def _show(self, text: str, running: float) -> None:
        """Tell the share that is done: time spent, against that and what is still expected."""
        spent = self.results.spent("cost/") + running
        whole = spent + max(self._coming - running, 0.0)
        self._shown = max(self._shown, spent / whole if whole else 0.0)
        self._tell(self._shown, text)


_WORDS = {
    "forward": "forward",
    "train": "forward and backward",
    "decode": "one more token",
}


class _Guarded:
    """A callable that keeps its first exception to itself and does nothing from then on."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self.error: Exception | None = None

    def __call__(self) -> None:
        if self.error is None:
            try:
                self._call()
            except Exception as error:
                self.error = error
