"""What torch's CPU allocator hands out and takes back, in order.

The legacy autograd profiler reports every allocation, also those that no dispatcher shows. It
changes nothing in what runs; a dispatch mode does: under one, torch's backward formulas avoid
in-place steps (gather, index, cumprod and others), which takes more memory than is usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Allocations", "can_record_allocations", "record_allocations"]


class Allocations:
    """The events of one recorded block; filled when the block ends.

    All figures stand above the lowest level before them, which is the level at entry unless the
    block first releases what was there (old gradients, say).

    Attributes:
        deltas: bytes of each allocation (positive) and release (negative), in order of time.
            Releases of what was allocated before entry are known only if that was recorded too;
            torch warns once on standard error of those that are not.
        peak: most bytes alive at once.
        current: bytes alive at the end.
        largest: bytes of the largest single allocation.
    """

    def __init__(self) -> None:
        self.deltas: list[int] = []
        self.peak = self.current = self.largest = 0

    def _close(self, deltas: list[int]) -> None:
        self.deltas = deltas
        level = lowest = 0
        for delta in deltas:
            level += delta
            lowest = min(lowest, level)
            self.peak = max(self.peak, level - lowest)
            self.largest = max(self.largest, delta)
        self.current = level - lowest


def can_record_allocations() -> bool:
    """Return whether this build of torch can report its CPU allocations."""
    return hasattr(torch.autograd, "_enable_profiler_legacy")


@contextmanager
def record_allocations() -> Iterator[Allocations]:
    """Record the CPU allocations of a block, on this thread and in autograd on its behalf.

    Raises:
        RuntimeError: a profiler is running already, or this torch cannot record.
    """
    if not can_record_allocations():
        raise RuntimeError(
            f"torch {torch.__version__} reports no CPU allocations: use track_memory()"
        )
    record = Allocations()
    try:
        _enable()
    except RuntimeError as error:
        raise RuntimeError(
            "allocations cannot be recorded while another profiler runs: leave it first"
        ) from error
    try:
        yield record
    finally:
        record._close(_memory_deltas(_disable()))


def _enable() -> None:
    enable: Callable[[Any], None] = torch.autograd._enable_profiler_legacy
    enable(
        torch.autograd.ProfilerConfig(
            torch.autograd.ProfilerState.CPU,
            False,  # shapes
            True,  # memory
            False,  # stacks
            False,  # flops
            False,  # modules
            torch._C._profiler._ExperimentalConfig(),
        )
    )


def _disable() -> list[list[Any]]:
    return torch.autograd._disable_profiler_legacy()


def _memory_deltas(threads: list[list[Any]]) -> list[int]:
    events = [[e for e in thread if e.kind() == "memory_alloc"] for thread in threads]
    events = [thread for thread in events if thread]
    if len(events) > 1:
        events = [sorted((e for thread in events for e in thread), key=lambda e: e.start_us())]
    deltas = (e.cpu_memory_usage() for thread in events for e in thread)
    return [d for d in deltas if d]
