"""FLOPs of a call, counted on the dispatcher, forward and backward, without silent zeros.

torch's own counter gives 0 for attention on the CPU, for matrix-vector products and for
everything it does not know. This one knows them, looks inside custom ops, and names what it
could not count: a wrong count is worse than none. What is counted, and by which convention, is
said in `flop_formulas`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch._ops import OpOverload

from manyheads.choose.dispatch import DeepMode, operator_name, tensors_in
from manyheads.choose.flop_formulas import FORMULAS, TRANSPARENT
from manyheads.choose.operator_kinds import is_light, moves_only
from manyheads.native import disabled

__all__ = ["FlopCount", "FlopCounter", "UncountedError", "count_flops", "register_flops"]

_REGISTERED: dict[str, Callable[..., int]] = {}


class UncountedError(RuntimeError):
    """Heavy operators ran for which there is no formula, so the total would be wrong."""


def register_flops(name: str, formula: Callable[..., int]) -> None:
    """Give the FLOPs of an operator whose body leaves torch (a compiled kernel).

    Operators written in torch need none: the counter looks inside. Formulas given to
    ``torch.utils.flop_counter.register_flop_formula`` are used as well, so code that may not
    import this module registers there.

    Args:
        name: ``"namespace::operator"``; its backward operator has a name of its own.
        formula: takes the operator's arguments as they were passed, returns FLOPs.

    Raises:
        ValueError: the name has no namespace, or has a formula already.
    """
    if "::" not in name:
        raise ValueError(f"operator name {name!r} has no namespace: write 'namespace::operator'")
    if name in _REGISTERED or name in FORMULAS:
        raise ValueError(f"operator {name!r} has a FLOP formula already")
    _REGISTERED[name] = formula


class FlopCounter(DeepMode):
    """Counts the FLOPs of a block: ``with FlopCounter() as counter: ...``.

    Attributes:
        by_operator: FLOPs of each operator, by name, ``"aten::bmm"``.
        elementwise: numbers touched by light operators that compute (pointwise, reductions,
            softmax, norms, scans): not FLOPs, and not in the total.
        uncounted: heavy operators without a formula, by name, with the elements of the largest
            tensor they touched; the total is right while this is empty.
        ignore_below: unknown operators on fewer elements than this are let pass.
    """

    def __init__(self, *, ignore_below: int = 1024) -> None:
        super().__init__()
        self.by_operator: dict[str, int] = {}
        self.elementwise = 0
        self.uncounted: dict[str, int] = {}
        self.ignore_below = ignore_below
        self._computed = False

    @property
    def total(self) -> int:
        """FLOPs of all counted operators."""
        return sum(self.by_operator.values())

    def check(self) -> None:
        """Raise unless everything heavy was counted.

        Raises:
            UncountedError: names the operators, and how to mend it.
        """
        if self.uncounted:
            raise UncountedError(
                f"no FLOP formula for {', '.join(sorted(self.uncounted))}: give one with "
                "register_flops, or the total would be too small"
            )

    def __enter__(self) -> Self:
        # What a compiled kernel computes cannot be seen: the PyTorch forms do the same work.
        self._kernels = disabled()
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._kernels.__exit__(None, None, None)
        return super().__exit__(*error)

    def handle(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = operator_name(func)
        dense = all(not t.is_sparse and not t.is_sparse_csr for t in tensors_in(args, kwargs))
        if name in _REGISTERED:
            self._add(name, int(_REGISTERED[name](*args, **kwargs)))
            return func(*args, **kwargs)
        if name in FORMULAS and dense:
            out = func(*args, **kwargs)
            self._add(name, FORMULAS[name](_by_name(func, args, kwargs), out))
            return out
        if is_light(func):
            out = func(*args, **kwargs)
            if not moves_only(func):
                self._computed = True
                self.elementwise += _largest(args, kwargs, out)
            return out
        if func.namespace != "aten" and (formula := _torch_formula(func)) is not None:
            out = func(*args, **kwargs)
            self._add(name, int(formula(*args, **kwargs, out_val=out)))
            return out
        return self._look_inside(func, args, kwargs)

    def _look_inside(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        before, self._computed = self._computed, False
        out = self.run(func, args, kwargs)
        known = self.sees_inside(func, args, kwargs) and (
            operator_name(func) in TRANSPARENT
            or func._can_decompose()
            # A body that computed nothing in torch has computed elsewhere.
            or (func._defined_in_python and self._computed)
        )
        self._computed = before or self._computed
        if not known:
            self._note(func, _largest(args, kwargs, out))
        return out

    def _add(self, name: str, flops: int) -> None:
        self._computed = True
        self.by_operator[name] = self.by_operator.get(name, 0) + flops

    def _note(self, func: OpOverload, elements: int) -> None:
        if elements >= self.ignore_below:
            name = operator_name(func)
            self.uncounted[name] = max(elements, self.uncounted.get(name, 0))


def _by_name(func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    named = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}
    named.update(zip((a.name for a in func._schema.arguments), args, strict=False))
    return named | kwargs


def _largest(*trees: Any) -> int:
    return max((t.numel() for t in tensors_in(*trees)), default=0)


def _torch_formula(func: OpOverload) -> Callable[..., int] | None:
    # Who has registered a formula there has imported it; importing it here takes seconds.
    counter = sys.modules.get("torch.utils.flop_counter")
    return None if counter is None else counter.flop_registry.get(func._overloadpacket)


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopCount:
    """FLOPs of one call.

    Attributes:
        total: FLOPs, 2 a multiply-add.
        by_operator: the same by operator.
        elementwise: numbers touched by light operators that compute; not in the total.
        uncounted: heavy operators without a formula (empty if the count was strict).
    """

    total: int
    by_operator: dict[str, int]
    elementwise: int
    uncounted: dict[str, int]


def count_flops(
    fn: Callable[..., Any], *args: Any, strict: bool = True, **kwargs: Any
) -> FlopCount:
    """Call ``fn`` once and return its FLOPs.

    Args:
        fn: what to call; it may run backward too.
        args, kwargs: what to call it with; meta tensors count without computing.
        strict: raise if anything heavy could not be counted.

    Raises:
        UncountedError: an unknown heavy operator ran, and ``strict``.
        RuntimeError: a higher-order operator ran, which cannot be followed.
    """
    with FlopCounter() as counter:
        fn(*args, **kwargs)
    if strict:
        counter.check()
    return FlopCount(
        total=counter.total,
        by_operator=dict(counter.by_operator),
        elementwise=counter.elementwise,
        uncounted=dict(counter.uncounted),
    )
