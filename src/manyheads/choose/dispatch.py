"""How the counters of this folder see every operator, also those inside other operators.

A dispatch mode is off while it handles an operator, so what that operator calls in turn (the
body of a custom op, the scratch tensors of a fused kernel) stays hidden. `DeepMode.run` sends an
operator straight to its backend kernel with the mode switched on again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DeepMode", "operator_name", "tensors_in"]

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def operator_name(func: OpOverload) -> str:
    """Return the operator's name without its overload: ``"aten::mm"``."""
    return func._schema.name


def tensors_in(*trees: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts, in order."""
    for tree in trees:
        if isinstance(tree, Tensor):
            yield tree
        elif isinstance(tree, (list, tuple)):
            yield from tensors_in(*tree)
        elif isinstance(tree, dict):
            yield from tensors_in(*tree.values())


class DeepMode(TorchDispatchMode):
    """A dispatch mode that can see inside the operators that it is shown.

    Subclasses define :meth:`handle`, which runs the operator by :meth:`run` (seen inside) or by
    calling it (not seen inside).

    Attributes:
        enclosing: the operators being run, from the outermost to the innermost.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enclosing: list[OpOverload] = []

    supports_higher_order_operators = True  # they are refused here, by name

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that says yes would import torch._dynamo, which takes seconds

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            raise RuntimeError(
                f"{func} is a higher-order operator: compiled, it runs other operators than those "
                "seen here, so a count would be wrong; measure an eager implementation instead"
            )
        return self.handle(func, args, kwargs or {})

    def handle(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run one operator and return what it returns."""
        raise RuntimeError(f"{type(self).__name__} does not say how it handles operators")

    def sees_inside(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Return whether :meth:`run` will show what this operator calls."""
        return _backend_key(func, args, kwargs) is not None

    def run(self, func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator so that those which its kernel calls come to :meth:`handle` too.

        Only the backend kernel is left to run here: autograd, views and conjugation are done
        above. Operators without a plain dense tensor (factories; sparse or wrapped tensors) have
        no single backend key and run unseen inside.
        """
        key = _backend_key(func, args, kwargs)
        if key is None:
            return func(*args, **kwargs)
        self.enclosing.append(func)
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        finally:
            self.enclosing.pop()


def _backend_key(
    func: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> torch._C.DispatchKey | None:
    # Views allocate at most their result. Detaching asks the mode for aten::detach again.
    if func.is_view or operator_name(func) == "aten::detach_":
        return None
    device = None
    for t in tensors_in(args, kwargs):
        if (
            type(t) not in _PLAIN
            or t.layout != torch.strided
            or t.is_quantized
            or t.is_nested
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
        ):
            return None
        if device is None or device == "cpu":
            device = t.device.type
    if device is None or _has_plain_number(func, args) or _chooses_backend(func):
        return None
    return getattr(torch._C.DispatchKey, torch._C._dispatch_key_for_device(device))


def _has_plain_number(func: OpOverload, args: Sequence[Any]) -> bool:
    # x + 2 reaches a mode as add.Tensor(x, 2); only the full dispatcher turns the 2 into a tensor.
    return any(
        isinstance(value, (bool, int, float, complex)) and isinstance(a.type, torch.TensorType)
        for a, value in zip(func._schema.arguments, args, strict=False)
    )


@cache
def _chooses_backend(func: OpOverload) -> bool:
    # Makers of sparse tensors and the like go by their layout argument, not by their tensors.
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "BackendSelect")
