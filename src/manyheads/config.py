"""Configs: frozen dataclasses that go to JSON and back, strict about their keys."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from manyheads.errors import nearest

__all__ = ["Config"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Base of every config: ``from_dict(to_dict())`` is the identity, an unknown key raises."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping; lists become tuples.

        Raises:
            ValueError: a key is not a field of this config; the nearest field is named.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(
                    f"{cls.__name__} has no option {key!r}{nearest(key, fields)}; "
                    f"it has: {', '.join(sorted(fields))}"
                )
        return cls(**{k: _tuples(v) for k, v in values.items()})

    def replace(self, **changes: Any) -> Self:
        """Return a copy with the named fields changed (same errors as :meth:`from_dict`)."""
        current = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.from_dict(current | changes)

    def to_json(self) -> str:
        """Return the config as one JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Build from the text that :meth:`to_json` returns."""
        return cls.from_dict(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
