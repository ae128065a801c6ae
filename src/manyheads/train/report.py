"""What a finished run says: results.json, and the same for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manyheads._version import __version__
from manyheads.choose.machine import machine_facts
from manyheads.train.options import TrainOptions

__all__ = ["facts", "print_results", "results"]


def facts() -> dict[str, Any]:
    """Return what the figures depend on beside the options, as JSON types."""
    import lightning_fabric

    return {
        **machine_facts(),
        "lightning_fabric": lightning_fabric.__version__,
        "manyheads": __version__,
    }


def results(
    options: TrainOptions,
    *,
    title: str,
    figures: dict[str, Any],
    hint: str = "",
    **more: Any,
) -> dict[str, Any]:
    """Return the content of results.json.

    Args:
        title: one line on what was trained on what.
        figures: the outcome by name, printed in this order.
        hint: a command to try next.
        more: further entries.
    """
    return {
        "schema": 1,
        "command": options.command(),
        "title": title,
        "figures": figures,
        "hint": hint,
        **more,
        "options": options.to_dict(),
        "machine": facts(),
    }


def print_results(folder: Path, *, finished: bool = False) -> None:
    """Print the results of a run.

    Args:
        folder: of the run.
        finished: say that it had been finished before.
    """
    read = json.loads((folder / "results.json").read_text())
    if finished:
        print(f"{folder} is finished already (--restart trains it anew):")
    print(read["title"])
    width = max(len(name) for name in read["figures"])
    for name, value in read["figures"].items():
        print(f"  {name.replace('_', ' '):{width}}  {_shown(value)}")
    print(f"The model, metrics.csv and results.json are in {folder}")
    if read["hint"]:
        print(f"Next: {read['hint']}")


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
