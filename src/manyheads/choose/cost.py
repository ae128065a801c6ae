"""One mechanism at one shape, ready to be called: forward, with backward, one more token.

What is called is the mechanism's function on (B, H, N, D) tensors, without projections: they are
the same for all. On a map it is the token mixer's module on (B, C, H, W), with its projections.
Inputs are a function of (seed, length), so one seed gives the same data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from manyheads.choose.flops import count_flops
from manyheads.choose.grid import GridSubject
from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import forward, forward_backward
from manyheads.layers.state import map_state, state_bytes, state_tensors
from manyheads.registry import Mechanism, Shape, get_mechanism

__all__ = ["Subject", "TensorPool", "bind", "draw_inputs", "filled_state"]

# Enough tokens to bring a state of constant size into its usual condition. It stands in the
# middle of a block of 64, so that mechanisms whose steps cost more towards the end of a block are
# met half-way.
_FILL = 544
_SHORT, _LONGER = 64, 96


class TensorPool:
    """Keeps one copy of equal tensors: mechanisms that draw the same queries, keys and values
    from one seed share them."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], list[Tensor]] = {}

    def share(self, tensor: Tensor) -> Tensor:
        """Return an equal tensor that was given before, or this one."""
        known = self._tensors.setdefault((tensor.dtype, *tensor.shape), [])
        for other in known:
            if torch.equal(other, tensor):
                return other
        known.append(tensor)
        return tensor

    def clear(self) -> None:
        """Forget all; tensors live on where they are used."""
        self._tensors.clear()


def draw_inputs(
    mechanism: Mechanism | GridSubject,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the random tensors that the mechanism's function takes, the same for one seed."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + shape.length)
    inputs = mechanism.inputs(shape, generator)
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}


def bind(mechanism: Mechanism, is_causal: bool) -> Callable[..., Any]:
    """Return the mechanism's function with its direction settled."""
    if "is_causal" in inspect.signature(mechanism.function).parameters:
        return partial(mechanism.function, is_causal=is_causal)
    return mechanism.function


class Subject:
    """A mechanism at a shape, with inputs of its own.

    Args:
        what: name of a mechanism, or a mixer at the maps of a workload.
        shape: of one layer; its ``is_causal`` is the direction.
        dtype: of the inputs.
        seed: of the inputs.
        pool: where equal inputs are shared with other subjects.
    """

    def __init__(
        self,
        what: str | GridSubject,
        shape: Shape,
        *,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        pool: TensorPool | None = None,
    ) -> None:
        self.mechanism = get_mechanism(what) if isinstance(what, str) else what
        self.shape, self.dtype, self.seed = shape, dtype, seed
        self._pool = TensorPool() if pool is None else pool
        self._calls: dict[str, Callable[[], Any]] = {}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """The function's tensors, made at first use: decoding needs none of this length."""
        inputs = draw_inputs(self.mechanism, self.shape, dtype=self.dtype, seed=self.seed)
        return {k: self._pool.share(t) for k, t in inputs.items()}

    def call(self, what: str) -> Callable[[], Any]:
        """Return the callable for ``forward``, ``train`` (forward and backward) or ``decode``
        (one more token after N, always the same one)."""
        if what not in self._calls:
            makers = {"forward": self._forward, "train": self._train, "decode": self._decode}
            self._calls[what] = makers[what]()
        return self._calls[what]

    def _function(self, training: bool) -> Callable[..., Any]:
        if isinstance(self.mechanism, GridSubject):
            module = self.mechanism.build(self.shape, training=training, seed=self.seed)
            return module.to(self.dtype)
        return bind(self.mechanism, self.shape.is_causal)

    def _forward(self) -> Callable[[], Any]:
        return forward(self._function(False), **self.inputs)

    def _train(self) -> Callable[[], Any]:
        return forward_backward(self._function(True), **self.inputs)

    def _decode(self) -> Callable[[], Any]:
        step = self.mechanism.step
        if step is None or isinstance(self.mechanism, GridSubject):
            raise ValueError(f"{self.mechanism.name} has no step")
        state, token = filled_state(self.mechanism, self.shape, dtype=self.dtype, seed=self.seed)
        with torch.no_grad():
            # The first step may enlarge a cache; the ones that are timed find room in it.
            _, state = step(state, **token)
        return forward(step, state, **token)

    def peak(self, what: str) -> dict[str, Any]:
        """Return the exact tensor memory of one call, above the inputs and a module's weights."""
        memory = peak_memory(self.call(what))
        return {
            "of": what,
            "peak_bytes": memory.peak_bytes,
            "retained_bytes": memory.retained_bytes,
            "largest_tensor_bytes": memory.largest_tensor_bytes,
            "method": memory.method,
        }

    def state_bytes(self) -> int | None:
        """Return the bytes of the state after N tokens, None without a streaming form."""
        mechanism = self.mechanism
        if isinstance(mechanism, GridSubject) or mechanism.update is None:
            return None
        if not self.shape.is_causal:
            return None
        state, _ = filled_state(mechanism, self.shape, dtype=self.dtype, seed=self.seed)
        return state_bytes(state)

    def counted_flops(self) -> int | None:
        """Return the FLOPs of the forward pass as counted; None where something heavy has no
        formula."""
        with torch.no_grad():
            count = count_flops(self._function(False), strict=False, **self.inputs)
        return None if count.uncounted else count.total


def filled_state(
    mechanism: Mechanism, shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Any, dict[str, Tensor]]:
    """Return a state after ``shape.length`` tokens, and the arguments of one more step.

    Filled by ``update`` on random inputs. A cache that grows by a place a token is filled with a
    few tokens and those are repeated along the axis that grows, so that a long context costs no
    more than its memory; where the state does not show such an axis all tokens are fed.

    Raises:
        ValueError: the mechanism has no streaming form.
    """
    update = mechanism.update
    if update is None:
        raise ValueError(f"{mechanism.name} has no update")
    length = _FILL if mechanism.constant_state else shape.length
    inputs = draw_inputs(mechanism, replace(shape, length=length + 2), dtype=dtype, seed=seed)
    moving = {k for k, t in inputs.items() if t.ndim == 4 and t.shape[2] == length + 2}

    def after(count: int) -> Any:
        block = {k: t[:, :, :count] if k in moving else t for k, t in inputs.items()}
        return update(None, **block)[1]

    # Copies: a view would keep the whole length alive.
    token = {k: t[:, :, -1].clone() if k in moving else t for k, t in inputs.items()}
    with torch.no_grad():
        if mechanism.constant_state or length <= _LONGER:
            return after(length), token
        long = after(_LONGER)
        grown = _grow(after(_SHORT), long, length)
        return (after(length) if grown is None else grown), token


def _grow(short: Any, long: Any, length: int) -> Any | None:
    """Stretch a state to ``length`` tokens by what two shorter ones differ in, or return None."""
    parts = []
    for a, b in zip(state_tensors(short), state_tensors(long), strict=True):
        axes = [i for i in range(b.ndim) if a.shape[i] != b.shape[i]] if a.ndim == b.ndim else [-1]
        if not axes and not b.is_floating_point() and bool((b == _LONGER).all()):
            parts.append(torch.full_like(b, length))
        elif not axes and torch.equal(a, b):
            parts.append(b)
        elif len(axes) == 1 and (a.shape[axes[0]], b.shape[axes[0]]) == (_SHORT, _LONGER):
            places = torch.arange(length, device=b.device) % _LONGER
            parts.append(b.index_select(axes[0], places))
        else:
            return None
    stretched = iter(parts)
    return map_state(lambda _: next(stretched), long)
