"""Errors that name what was given, what was expected and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["MissingExtraError", "nearest", "require_extra", "unknown_name"]


class MissingExtraError(ImportError):
    """An optional dependency is absent; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the closest known name, or an empty string."""
    names = list(known)
    lowered = {n.lower(): n for n in names}
    hits = get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[hits[0]]!r}?)" if hits else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Build the error for a name that no table holds: what it is, the nearest, and all of them."""
    names = sorted(known)
    return ValueError(
        f"unknown {kind} {name!r}{nearest(name, names)}; known: {', '.join(names) or 'none'}"
    )


def require_extra(module: str, extra: str, purpose: str) -> None:
    """Raise :class:`MissingExtraError` naming the extra unless ``module`` can be imported."""
    from importlib.util import find_spec

    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise MissingExtraError(
            f"{purpose} needs {module}, which is not installed: pip install 'manyheads[{extra}]'"
        )
