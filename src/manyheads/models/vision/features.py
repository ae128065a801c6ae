"""Which maps of a backbone are asked for, and what is known about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["FeatureInfo", "indices_of"]


def indices_of(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Return the places that ``indices`` names among ``count`` stages, ascending.

    Args:
        indices: places (negative from the end), a number for the last so many, None for all.
        count: stages there are.

    Raises:
        ValueError: a place that does not exist, or none at all.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 1 <= indices <= count:
            raise ValueError(f"the last {indices} stages: the model has {count}, give 1 to {count}")
        return list(range(count - indices, count))
    for i in indices:
        if not -count <= i < count:
            raise ValueError(
                f"stage {i} does not exist: the model has {count}, give {-count} to {count - 1}"
            )
    places = sorted({i % count for i in indices})
    if not places:
        raise ValueError("no stage is named: give at least one index, or None for all")
    return places


class FeatureInfo:
    """Channels, strides and modules of some maps, as timm's object of that name answers.

    Args:
        rows: a dict a map: ``num_chs``, ``reduction``, ``module``.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = [dict(r) for r in rows]

    def channels(self, index: int | None = None) -> Any:
        """Return the channels of all maps, or of one."""
        return self._get("num_chs", index)

    def reduction(self, index: int | None = None) -> Any:
        """Return the strides of all maps, or of one."""
        return self._get("reduction", index)

    def module_name(self, index: int | None = None) -> Any:
        """Return the names of the modules that make the maps, or one name."""
        return self._get("module", index)

    def get_dicts(self) -> list[dict[str, Any]]:
        """Return a copy of the rows."""
        return [dict(r) for r in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def _get(self, key: str, index: int | None) -> Any:
        values = [r[key] for r in self._rows]
        return values if index is None else values[index]
