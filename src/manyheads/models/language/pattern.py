"""Which mechanism each layer uses, as text: ``"gla*3,softmax"``."""

from __future__ import annotations

import re

from manyheads.registry import get_mechanism

__all__ = ["parse_pattern"]

_ITEM = re.compile(r"\s*([\w.-]+)\s*(?:\*\s*(\d+))?\s*")


def parse_pattern(pattern: str | tuple[str, ...], num_layers: int | None = None) -> tuple[str, ...]:
    """Return one mechanism name a layer.

    Args:
        pattern: names separated by commas, each with an optional count, or a tuple of names.
        num_layers: the pattern is repeated to this number; None: once.

    Raises:
        ValueError: the text is no pattern, a mechanism is unknown, or ``num_layers`` is no
            multiple of the pattern's length.

    Example:
        >>> parse_pattern("gla*3,softmax", 8)
        ('gla', 'gla', 'gla', 'softmax', 'gla', 'gla', 'gla', 'softmax')
    """
    names: list[str] = []
    for item in pattern.split(",") if isinstance(pattern, str) else pattern:
        match = _ITEM.fullmatch(item)
        if not match or match.group(2) == "0":
            raise ValueError(
                f"{item!r} is no part of a layer pattern: write names with counts, 'gla*3,softmax'"
            )
        get_mechanism(match.group(1))
        names += [match.group(1)] * int(match.group(2) or 1)
    if num_layers is None:
        num_layers = len(names)
    if num_layers < 1 or num_layers % len(names):
        raise ValueError(
            f"num_layers {num_layers} is not a multiple of the {len(names)} layers of the pattern "
            f"{pattern!r}"
        )
    return tuple(names) * (num_layers // len(names))
