"""Load compiled kernels and call them with tensors."""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from manyheads.native.build import BuildError, build, families, library_path

__all__ = ["Library", "disabled", "library", "pointer", "require", "status", "strided"]

_log = logging.getLogger("manyheads")
_loaded: dict[str, Library | None] = {}
_reason: str | None = None
_off = 0


class Library:
    """The functions of one family; each returns nothing and takes pointers, integers and floats.

    Pointers are passed as :func:`pointer` gives them, integers as int64, floats as float32, a
    tuple of integers as a pointer to int64.
    """

    def __init__(self, path: str) -> None:
        self._handle = ctypes.CDLL(path)
        self._bound: dict[str, Any] = {}

    def bind(self, function: str, *, pointers: int, integers: int) -> Callable[..., None]:
        """Return a function that takes addresses (or None), then integers, as Python's own.

        Unlike a call of the library it checks no tensor, which takes longer than a small kernel.
        """
        found: Any = self._bound.get(function)
        if found is None:
            found = self._handle[function]  # apart from the one that __call__ uses
            found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
            found.restype = None
            self._bound[function] = found
        return found

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call ``function`` with tensors (contiguous, on the CPU; or what :func:`pointer` and
        :func:`strided` return), None, integers, floats and tuples of integers."""
        getattr(self._handle, function)(*(_as_c(a) for a in arguments))


def _as_c(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return pointer(value)
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    if isinstance(value, ctypes.c_void_p):
        return value
    if isinstance(value, tuple):
        return (ctypes.c_int64 * len(value))(*value)
    return ctypes.c_float(value)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's first number, or a null pointer for None.

    Raises:
        ValueError: the tensor is not on the CPU or not contiguous.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"a kernel reads contiguous tensors on the CPU, got {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} on {tensor.device}: use .contiguous()"
        )
    return ctypes.c_void_p(tensor.data_ptr())


def strided(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return the address of a tensor's first number, whatever its strides: for a kernel that is
    told them. A null pointer for None.

    Raises:
        ValueError: the tensor is not on the CPU.
    """
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.device.type != "cpu":
        raise ValueError(f"a kernel reads tensors on the CPU, got one on {tensor.device}")
    return ctypes.c_void_p(tensor.data_ptr())


def require(family: str, *, like: Tensor) -> None:
    """Make sure that a family's kernels can work on a tensor.

    Raises:
        RuntimeError: they cannot; says why and what to do.
    """
    if like.device.type != "cpu" or like.dtype != torch.float32:
        raise RuntimeError(
            f"the kernels work in float32 on the CPU, not in {like.dtype} on {like.device}: "
            'use implementation="auto"'
        )
    if _off:
        raise RuntimeError("the kernels are switched off here by manyheads.native.disabled()")
    if library(family) is None:
        raise RuntimeError(f"the kernels of {family!r} cannot be had: {_reason}")


def library(family: str, *, like: Tensor | None = None) -> Library | None:
    """Return the library of a family, compiling it at first use; None where it cannot be had.

    That no compiler is there, or that it failed, is said once, as a warning.

    Args:
        family: name of a file of ``csrc/``.
        like: a tensor that is to be worked on: None is returned unless it is float32 on the CPU.
    """
    if _off or (like is not None and (like.device.type != "cpu" or like.dtype != torch.float32)):
        return None
    if family not in _loaded:
        _loaded[family] = _load(family)
    return _loaded[family]


def _load(family: str) -> Library | None:
    global _reason
    try:
        return Library(str(build(family)))
    except (BuildError, OSError) as error:
        if _reason is None:
            _log.warning(
                "kernels are not compiled, PyTorch forms run instead (slower): %s. "
                "`manyheads doctor` says what that costs",
                error,
            )
        _reason = str(error)
        return None


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run the PyTorch forms inside the block, as where there is no compiler."""
    global _off
    _off += 1
    try:
        yield
    finally:
        _off -= 1


def status() -> dict[str, str]:
    """Return for each family "compiled", "not compiled yet" or why it cannot be."""
    found = {}
    for family in families():
        try:
            found[family] = "compiled" if library_path(family).exists() else "not compiled yet"
        except BuildError as error:
            found[family] = str(error)
    return found
