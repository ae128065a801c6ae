"""States of streaming mechanisms: nested tuples of tensors, batch first.

A state is a NamedTuple whose leaves are tensors with the batch as first axis (or None, or
another such tuple, or a :class:`StateObject`). That one rule is enough to count, move, copy and
reorder all of them.
A state that was passed to ``update`` or ``step`` is consumed: a key-value cache is written in
place. Branch from a state with :func:`clone_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

__all__ = [
    "StateObject",
    "clone_state",
    "map_state",
    "reorder_state",
    "state_bytes",
    "state_tensors",
]

S = TypeVar("S")


class StateObject:
    """A part of a state that is no tuple, because it decides as it goes what it holds."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors that are held, batch first."""
        raise NotImplementedError

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Return another one with ``fn`` applied to every tensor; this one stays as it is."""
        raise NotImplementedError


def map_state(fn: Callable[[Tensor], Tensor], state: S) -> S:
    """Apply ``fn`` to every tensor of a state and rebuild the same tuples around the results."""
    return _map(fn, state)


def _map(fn: Callable[[Tensor], Tensor], state: Any) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, StateObject):
        return state.map(fn)
    parts = [_map(fn, part) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)


def state_tensors(state: Any) -> list[Tensor]:
    """Return all tensors of a state, in order."""
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, StateObject):
        return state.tensors()
    return [t for part in state for t in state_tensors(part)]


def state_bytes(state: Any) -> int:
    """Return the bytes that a state holds (storages counted whole, shared ones once)."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state_tensors(state)}
    return sum(s.nbytes() for s in storages.values())


def clone_state(state: S) -> S:
    """Return an independent copy, to branch from one state twice."""
    return map_state(torch.clone, state)


def reorder_state(state: S, index: Tensor) -> S:
    """Select and repeat batch rows, as beam search does: row i becomes old row ``index[i]``."""
    return map_state(lambda t: t.index_select(0, index.to(t.device)), state)
