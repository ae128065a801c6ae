"""Attention that runs and trains on a CPU: choose, train, shrink and inspect it.

Everything here is loaded when it is first used; importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from manyheads._version import __version__

if TYPE_CHECKING:
    from manyheads import attention, choose, layers, models
    from manyheads.models import create_model, list_models
    from manyheads.registry import get_mechanism, list_mechanisms

__all__ = [
    "__version__",
    "attention",
    "choose",
    "create_model",
    "get_mechanism",
    "layers",
    "list_mechanisms",
    "list_models",
    "models",
]

_HOMES = {
    "create_model": "manyheads.models",
    "list_models": "manyheads.models",
    "get_mechanism": "manyheads.registry",
    "list_mechanisms": "manyheads.registry",
    "Workload": "manyheads.choose",
}
_PACKAGES = {"attention", "choose", "data", "layers", "models", "papers", "train"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"manyheads.{name}")
    raise AttributeError(f"module 'manyheads' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOMES, *_PACKAGES})
