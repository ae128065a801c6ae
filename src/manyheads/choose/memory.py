"""Exact peak tensor memory of a call.

Two ways, and when to use which:

- :func:`peak_memory` reads torch's own allocator: every byte, kernels' scratch included, and
  nothing changes in what runs. It gives totals.
- :func:`track_memory` follows storages through a dispatch mode. It is live, says what the
  largest tensor was and which operator made it, and works on the meta device, where it predicts
  without allocating. Storages count once however many views they have, until the last reference
  (Python's or autograd's) is gone; backward, in-place growth, ``autograd.Function`` and the
  bodies of custom ops are covered. Under any dispatch mode torch's backward of gather, index,
  cumprod and some others avoids in-place steps, so their figures can be higher than usual, and
  scratch that a kernel takes without the dispatcher (convolutions, LSTM) is not seen.

Neither sees what C code takes from malloc. Code compiled by ``torch.compile`` runs eagerly under
a dispatch mode; on the meta device SDPA takes its quadratic form.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload

from manyheads.choose.allocations import can_record_allocations, record_allocations
from manyheads.choose.dispatch import DeepMode, operator_name, tensors_in

__all__ = ["MemoryTracker", "PeakMemory", "largest_tensor_numel", "peak_memory", "track_memory"]

# Through these come tensors that no operator has made (torch.tensor([...])): what they are
# given is new.
_ENTRANCES = {"aten::lift", "aten::lift_fresh", "aten::lift_fresh_copy"}


@dataclass(slots=True)
class _Storage:
    """A live storage: ``size`` bytes now, of which ``base`` were there at entry."""

    base: int
    size: int
    ref: weakref.ref[torch.UntypedStorage]

    @property
    def counted(self) -> int:
        return max(self.size - self.base, 0)


class MemoryTracker(DeepMode):
    """Follows storages; entered through :func:`track_memory`.

    Storages that existed at entry are not counted, and neither is their release.

    Attributes:
        current: bytes allocated since entry and still alive.
        peak: the most that ``current`` ever was.
        largest: bytes of the largest single storage.
        largest_numel: most elements of any single storage, in the dtype it was made with: a
            bool mask of N x N has N², as a float one has.
        largest_shape: the tensor of ``largest_numel``, as it was first seen.
        largest_operator: what made it, outermost first: ``"aten::bmm"``,
            ``"manyheads::scan > aten::empty"``.
        untracked: operators that returned tensors without a storage to follow (mkldnn layouts).
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self.largest = 0
        self.largest_numel = 0
        self.largest_shape: tuple[int, ...] = ()
        self.largest_operator = ""
        self.untracked: set[str] = set()
        self._live: dict[int, _Storage] = {}

    def handle(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        # A kernel in C++ takes scratch from the allocator and shows it first as an argument.
        is_new = operator_name(func) in _ENTRANCES or (
            bool(self.enclosing) and not self.enclosing[-1]._defined_in_python
        )
        for t in tensors_in(args, kwargs):
            self._see(t, is_new=is_new)
        out = self.run(func, args, kwargs)
        for t in tensors_in(out):
            self._see(t, func, is_new=True)
        return out

    def _see(self, tensor: Tensor, func: OpOverload | None = None, *, is_new: bool) -> None:
        for part in _parts(tensor):
            try:
                storage = part.untyped_storage()
            except (NotImplementedError, RuntimeError):
                if is_new:
                    self.untracked.add(self._path(func))
                continue
            size = storage.nbytes()
            entry = self._live.get(storage._cdata)
            if entry is None:
                base = 0 if is_new else size
                entry = _Storage(base, base, self._on_death(storage))
                self._live[storage._cdata] = entry
            if entry.size != size:
                self._resize(entry, size)
                self._compare_largest(entry, part, func)

    def _on_death(self, storage: torch.UntypedStorage) -> weakref.ref[torch.UntypedStorage]:
        key = storage._cdata

        def forget(_: object) -> None:
            entry = self._live.pop(key, None)
            if entry is not None:
                self.current -= entry.counted

        return weakref.ref(storage, forget)

    def _resize(self, entry: _Storage, size: int) -> None:
        if entry.size and size > entry.size:
            # What grows is copied: for a moment the old block and the new one both exist.
            self.peak = max(self.peak, self.current + size)
        self.current -= entry.counted
        entry.size = size
        self.current += entry.counted
        self.peak = max(self.peak, self.current)

    def _compare_largest(self, entry: _Storage, tensor: Tensor, func: OpOverload | None) -> None:
        self.largest = max(self.largest, entry.counted)
        numel = entry.counted // tensor.element_size()
        if numel > self.largest_numel:
            self.largest_numel = numel
            self.largest_shape = tuple(tensor.shape)
            self.largest_operator = self._path(func)

    def _path(self, func: OpOverload | None) -> str:
        return " > ".join(operator_name(f) for f in [*self.enclosing, func] if f is not None)

    def _stop(self) -> None:
        self._live.clear()


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    if tensor.layout == torch.sparse_coo:
        return (tensor._indices(), tensor._values())
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    return (tensor,)


@contextmanager
def track_memory() -> Iterator[MemoryTracker]:
    """Follow the tensor memory of a block.

    The figures are bytes above what was alive at entry; they can be read inside the block and
    stand still after it. Blocks may be nested; each has its own figures.

    Raises:
        RuntimeError: the block runs a higher-order operator (flex_attention), which cannot be
            followed.

    Example:
        >>> with track_memory() as tracker:
        ...     y = torch.ones(1000).exp()
        >>> tracker.peak, tracker.current
        (8000, 4000)
    """
    tracker = MemoryTracker()
    try:
        with tracker:
            yield tracker
    finally:
        tracker._stop()


@dataclass(frozen=True, kw_only=True, slots=True)
class PeakMemory:
    """Tensor memory of one call, in bytes above what was alive before it.

    Attributes:
        peak_bytes: the most that was alive at once, results included.
        retained_bytes: what is alive at the end, while the result is: the result itself, what
            autograd saved for backward, gradients accumulated in ``.grad``.
        largest_tensor_bytes: the largest single tensor.
        method: how it was measured, ``"allocator"`` or ``"dispatch"``.
    """

    peak_bytes: int
    retained_bytes: int
    largest_tensor_bytes: int
    method: Literal["allocator", "dispatch"]


def peak_memory(
    fn: Callable[..., Any],
    *args: Any,
    method: Literal["auto", "allocator", "dispatch"] = "auto",
    **kwargs: Any,
) -> PeakMemory:
    """Call ``fn`` once and return the tensor memory it took.

    Args:
        fn: what to call; what it returns is dropped.
        args, kwargs: what to call it with.
        method: ``"allocator"`` is exact on the CPU; ``"dispatch"`` is :func:`track_memory`, for
            the meta device and for accelerators; ``"auto"`` is the first where torch has it.

    Raises:
        ValueError: an unknown method.
        RuntimeError: a profiler is running (allocator), or ``fn`` made tensors that cannot be
            followed (dispatch).
    """
    if method not in ("auto", "allocator", "dispatch"):
        raise ValueError(f"method {method!r} is not one of 'auto', 'allocator', 'dispatch'")
    if method == "dispatch" or (method == "auto" and not can_record_allocations()):
        return _peak_by_dispatch(fn, *args, **kwargs)
    with _collector_off(), record_allocations() as record:
        # The result must outlive the block, or what is retained would read as nothing.
        result = fn(*args, **kwargs)
    del result
    return PeakMemory(
        peak_bytes=record.peak,
        retained_bytes=record.current,
        largest_tensor_bytes=record.largest,
        method="allocator",
    )


def _peak_by_dispatch(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> PeakMemory:
    with _collector_off(), track_memory() as tracker:
        result = fn(*args, **kwargs)
        retained = tracker.current
    del result
    if tracker.untracked:
        raise RuntimeError(
            f"{', '.join(sorted(tracker.untracked))} returned tensors without a storage to follow, "
            "so their memory is not known: convert them with to_dense()"
        )
    return PeakMemory(
        peak_bytes=tracker.peak,
        retained_bytes=retained,
        largest_tensor_bytes=tracker.largest,
        method="dispatch",
    )


@contextmanager
def _collector_off() -> Iterator[None]:
    # Garbage of before that is collected in the middle would make the figures depend on luck.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def largest_tensor_numel(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the number of elements of the largest tensor made while ``fn`` runs.

    To assert that nothing quadratic in the length is ever made, forward or backward:
    ``assert largest_tensor_numel(fn, q, k, v) < B * H * N * N``.
    """
    with track_memory() as tracker:
        fn(*args, **kwargs)
    return tracker.largest_numel
