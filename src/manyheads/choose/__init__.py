"""Which attention fits a workload, measured on this machine.

The package is also the function: ``manyheads.choose(Workload(...)) -> Report``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyheads.choose.report import Report
    from manyheads.choose.results import Answer, CostRow, QualityRow, Results, Summary
    from manyheads.choose.workload import Workload

__all__ = [
    "Answer",
    "CostRow",
    "QualityRow",
    "Report",
    "Results",
    "Summary",
    "Workload",
]

_HOMES = {
    "Answer": "results",
    "CostRow": "results",
    "QualityRow": "results",
    "Report": "report",
    "Results": "results",
    "Summary": "results",
    "Workload": "workload",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"manyheads.choose.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'manyheads.choose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})


class _Choose(ModuleType):
    """The package, callable."""

    def __call__(self, workload: Workload, **options: Any) -> Report:
        from manyheads.choose.run import choose

        return choose(workload, **options)


sys.modules[__name__].__class__ = _Choose
