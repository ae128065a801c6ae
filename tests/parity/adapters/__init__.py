"""One file a paper; each registers a function for every kind of golden file of its system."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

__all__ = ["implemented", "load_adapters"]


def implemented() -> set[str]:
    """Return the slugs of the papers that have adapters."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return {f.stem.replace("_", "-") for f in files}


def load_adapters() -> None:
    """Import all adapter files."""
    for slug in sorted(implemented()):
        import_module(f"parity.adapters.{slug.replace('-', '_')}")
