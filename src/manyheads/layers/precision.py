"""Keeping a computation in the precision of its tensors, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["no_autocast", "without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast is off; of the meta device: nothing."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Decorate the body of a custom operator: its matrix products keep their inputs' dtype.

    Autocast reaches into operators written in Python; sums that are float32 by contract would be
    made in half precision there. The device is that of the first argument.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with no_autocast(first.device):
            return fn(*args, **kwargs)

    return run
