"""Keeping a computation in the precision of its tensors, whatever autocast says."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["is_plain_inference", "is_unwatched_inference", "no_autocast", "without_autocast"]

P = ParamSpec("P")
R = TypeVar("R")


def is_unwatched_inference() -> bool:
    """Say whether nothing wants gradients, and nobody traces, transforms or watches what runs."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def is_plain_inference(*tensors: Tensor) -> bool:
    """Say whether a kernel may run on tensors unseen by torch: plain float32 on the CPU, no
    autocast, and :func:`is_unwatched_inference`."""
    return (
        is_unwatched_inference()
        and not torch.is_autocast_enabled("cpu")
        and all(
            t.dtype == torch.float32
            and t.device.type == "cpu"
            and type(t) in (Tensor, nn.Parameter)
            for t in tensors
        )
    )


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
