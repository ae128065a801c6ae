"""Official checkpoints, both ways: a declarative table of names with ``{}`` for indices.

A model states its map once; :meth:`OfficialWeights.load_official` and
:meth:`OfficialWeights.to_official` read it in the two directions, strictly.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from manyheads.errors import nearest

__all__ = [
    "Entry",
    "KeyMap",
    "OfficialWeights",
    "constant",
    "convert",
    "merge",
    "read_weights",
    "rename",
    "split",
    "tied",
]


@dataclass(frozen=True)
class Entry:
    """One rule: our keys, the official keys, and how tensors change on the way.

    ``ours`` is empty for a tensor that only the official file has. ``load`` takes the official
    tensors and returns ours, ``save`` the reverse, each as a tuple (None: unchanged). ``is_tied``
    marks a second official name of a tensor that another entry loads, ``optional`` an official
    tensor that a file may leave out.
    """

    ours: tuple[str, ...]
    official: tuple[str, ...]
    load: Callable[..., tuple[Tensor, ...]] | None = None
    save: Callable[..., tuple[Tensor, ...]] | None = None
    is_tied: bool = False
    optional: bool = False


def rename(ours: str, official: str) -> Entry:
    """The same tensor under another name."""
    return Entry((ours,), (official,))


def convert(
    ours: str,
    official: str,
    load: Callable[[Tensor], Tensor],
    save: Callable[[Tensor], Tensor],
) -> Entry:
    """The same numbers in another layout; ``save`` undoes ``load``."""
    return Entry((ours,), (official,), lambda t: (load(t),), lambda t: (save(t),))


def merge(ours: str, officials: Iterable[str], *, dim: int = 0) -> Entry:
    """Several official tensors of equal size that are one of ours, concatenated along ``dim``."""
    names = tuple(officials)
    return Entry(
        (ours,),
        names,
        lambda *ts: (torch.cat(ts, dim),),
        lambda t: tuple(p.clone() for p in t.chunk(len(names), dim)),
    )


def split(ours: Iterable[str], official: str, *, dim: int = 0) -> Entry:
    """One official tensor that is several of ours of equal size, cut along ``dim``."""
    names = tuple(ours)
    return Entry(
        names,
        (official,),
        lambda t: tuple(p.clone() for p in t.chunk(len(names), dim)),
        lambda *ts: (torch.cat(ts, dim),),
    )


def tied(ours: str, official: str) -> Entry:
    """A second official name of a tensor that we hold once; the two must be equal."""
    return Entry((ours,), (official,), is_tied=True)


def constant(official: str, value: Tensor, *, optional: bool = False) -> Entry:
    """A buffer that only official files hold: dropped on loading, written as ``value``."""
    return Entry((), (official,), save=lambda: (value.clone(),), optional=optional)


def read_weights(source: str | PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a state dict from safetensors or a torch file; nothing in the file is executed.

    Args:
        source: a path ending in ``.safetensors``, any other torch file (read with
            ``weights_only=True``; a nesting under ``state_dict_ema``, ``state_dict`` or ``model``
            is opened), or a mapping, which is returned as a dict.

    Raises:
        ValueError: the path is missing, or holds no mapping of names to tensors.
    """
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no weights at {str(path)!r}: give a file or a state dict")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for nesting in ("state_dict_ema", "state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(nesting), Mapping):
            loaded = loaded[nesting]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ValueError(f"{str(path)!r} holds no state dict (a mapping of names to tensors)")
    return dict(loaded)


class KeyMap:
    """The table of a model; ``{}`` stands for an index and is the same on both sides."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = entries

    def to_ours(
        self, official: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return our state dict.

        Raises:
            ValueError: keys are missing, left over or of another shape; all are listed.
        """
        ours: dict[str, Tensor] = {}
        used: set[str] = set()
        ties: list[tuple[str, str]] = []
        problems: list[str] = []
        for entry, indices in self._expand([*official, *expected]):
            names = _fill(entry.official, indices)
            keys = _fill(entry.ours, indices)
            missing = [n for n in names if n not in official]
            if missing:
                wanted = not keys or any(k in expected for k in keys)
                if wanted and not entry.optional:
                    problems += [f"missing {n!r}{nearest(n, official)}" for n in missing]
                used.update(names)
                continue
            if keys and not all(k in expected for k in keys):
                continue
            used.update(names)
            if entry.is_tied:
                ties.append((keys[0], names[0]))
            elif keys:
                tensors = tuple(official[n] for n in names)
                loaded = entry.load(*tensors) if entry.load else tensors
                ours.update(zip(keys, loaded, strict=True))
        for key, name in ties:
            if key in ours and not _equal(ours[key], official[name]):
                problems.append(f"{name!r} is tied to {key!r} here, but the file holds two tensors")
        known = [n for e, i in self._expand(expected) for n in _fill(e.official, i)]
        problems += [f"unexpected {n!r}{nearest(n, known)}" for n in official if n not in used]
        problems += [
            f"{k!r} has shape {tuple(t.shape)}, this variant needs {tuple(expected[k].shape)}"
            for k, t in ours.items()
            if t.shape != expected[k].shape
        ]
        if not problems:
            problems = [f"no rule fills our {k!r}" for k in expected if k not in ours]
        if problems:
            shown = list(dict.fromkeys(problems))
            more = f"\n  ... and {len(shown) - 20} more" if len(shown) > 20 else ""
            raise ValueError(
                "the weights do not fit this model:\n  " + "\n  ".join(shown[:20]) + more
            )
        return ours

    def to_official(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the official state dict of ours."""
        official: dict[str, Tensor] = {}
        for entry, indices in self._expand(ours):
            keys = _fill(entry.ours, indices)
            if not all(k in ours for k in keys):
                continue
            tensors = tuple(ours[k] for k in keys)
            saved = entry.save(*tensors) if entry.save else tensors
            official.update(zip(_fill(entry.official, indices), saved, strict=True))
        return official

    def _expand(self, keys: Iterable[str]) -> list[tuple[Entry, tuple[str, ...]]]:
        """Return each entry with each set of indices found among ``keys``, ours or official."""
        names = list(keys)
        found: dict[tuple[int, tuple[str, ...]], None] = {}
        for number, entry in enumerate(self.entries):
            patterns = (*entry.ours, *entry.official)
            if not any("{}" in p for p in patterns):
                found[(number, ())] = None
                continue
            for pattern in patterns:
                regex = _regex(pattern)
                for name in names:
                    if match := regex.fullmatch(name):
                        found[(number, match.groups())] = None
        return [(self.entries[number], indices) for number, indices in found]


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(p) for p in pattern.split("{}")))


def _fill(patterns: tuple[str, ...], indices: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(p.format(*indices) if indices else p for p in patterns)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or b.is_meta or torch.equal(a, b)


class OfficialWeights(nn.Module):
    """Mixin of modules and models whose weights exist under official names."""

    def key_map(self) -> KeyMap:
        """Return the map between our names and the official ones, for this config."""
        raise NotImplementedError(f"{type(self).__name__} has no official checkpoint layout")

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load an official checkpoint (a path or a state dict), strictly; returns self.

        Raises:
            ValueError: a key is missing, left over or of another shape, with nearest names.
        """
        expected = dict(self.state_dict(keep_vars=True))
        first: dict[int, str] = {}
        twins = {k: first[id(v)] for k, v in expected.items() if first.setdefault(id(v), k) != k}
        unique = {k: v for k, v in expected.items() if k not in twins}
        ours = self.key_map().to_ours(read_weights(source), unique)
        on_meta = any(t.is_meta for t in unique.values())
        self.load_state_dict(ours | {k: ours[n] for k, n in twins.items()}, assign=on_meta)
        for twin, name in twins.items():
            owner, _, leaf = twin.rpartition(".")
            setattr(self.get_submodule(owner), leaf, self.get_parameter(name))
        return self

    def to_official(self) -> dict[str, Tensor]:
        """Return the weights under their official names and in their official layout."""
        return self.key_map().to_official(self.state_dict())
