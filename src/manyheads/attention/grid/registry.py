"""Token mixers on maps: modules from (B, C, H, W) to (B, C, H, W), by name.

B batch, C channels, H and W rows and columns, N = H · W.

A mixer is said once, here, with the facts that `choose` and the docs are made from. Bidirectional
mechanisms on sequences are mixers too, on the flattened map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from manyheads.errors import unknown_name
from manyheads.registry import get_mechanism, list_mechanisms

__all__ = ["GridShape", "Mixer", "build_mixer", "get_mixer", "list_mixers", "register_mixer"]

# Files that register mixers when imported.
_FILES = (
    "manyheads.attention.aggregated.mixers",
    "manyheads.attention.dual_token.module",
    "manyheads.attention.grid.basic",
    "manyheads.attention.grid.distance",
    "manyheads.attention.grid.outlook",
    "manyheads.attention.grid.svga",
    "manyheads.attention.soft.module",
)


@dataclass(frozen=True, kw_only=True)
class GridShape:
    """Sizes of one mixer: a batch of maps, C channels, H x W places."""

    batch: int = 1
    dim: int = 96
    height: int = 56
    width: int = 56
    num_heads: int = 3

    @property
    def tokens(self) -> int:
        return self.height * self.width


class _Builder(Protocol):
    def __call__(
        self, dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
    ) -> nn.Module: ...


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """A token mixer on maps and its facts.

    Attributes:
        name: registry name.
        summary: one line, first what it computes, then what it gives up.
        paper: slug of its card, or None.
        build: ``build(dim, num_heads=, grid=, **options)`` returns the module; ``grid`` is rows
            and columns of the map where the mixer is made for a size, else it may be None.
        any_size: takes maps of other sizes than it was built for.
        cost: asymptotic cost in words of N, C and window sizes.
        flops: forward FLOPs (2 a multiply-add) of matrix products and convolutions, projections
            included, closed form.
        extra: numbers that the forward pass must hold beside maps of C channels and its weights.
    """

    name: str
    summary: str
    paper: str | None
    build: _Builder
    any_size: bool
    cost: str
    flops: Callable[[GridShape], int]
    extra: Callable[[GridShape], int] = field(default=lambda s: 0)
    notes: tuple[str, ...] = field(default=())


_REGISTRY: dict[str, Mixer] = {}


def register_mixer(mixer: Mixer) -> Mixer:
    """Enter a mixer under its name; a name is taken once."""
    if mixer.name in _REGISTRY:
        raise ValueError(f"mixer {mixer.name!r} is registered already")
    _REGISTRY[mixer.name] = mixer
    return mixer


def _load_all() -> None:
    for file in _FILES:
        import_module(file)


def list_mixers(pattern: str = "*") -> list[str]:
    """Return the names of all mixers on maps that match a glob pattern, sorted."""
    _load_all()
    names = {*_REGISTRY, *(n for n in list_mechanisms() if get_mechanism(n).bidirectional)}
    return sorted(n for n in names if fnmatchcase(n, pattern))


def get_mixer(name: str) -> Mixer:
    """Return the mixer of that name; bidirectional mechanisms are wrapped for the flattened map.

    Raises:
        ValueError: no such mixer; the nearest name is given.
    """
    _load_all()
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name in list_mixers():
        from manyheads.attention.grid.flat import mixer_of

        return mixer_of(name)
    raise unknown_name("token mixer", name, list_mixers())


def build_mixer(
    name: str,
    dim: int,
    *,
    num_heads: int = 1,
    grid: tuple[int, int] | None = None,
    **options: Any,
) -> nn.Module:
    """Build the module of a mixer for C = ``dim`` channels.

    Args:
        name: out of :func:`list_mixers`.
        dim: C.
        num_heads: of mixers that have heads.
        grid: rows and columns of the map, for mixers that are made for a size.
        options: of this mixer alone.

    Raises:
        ValueError: unknown name or option, or a size that the mixer cannot have.
    """
    return get_mixer(name).build(dim, num_heads=num_heads, grid=grid, **options)
