"""The registry of mechanisms: a name, what it can do and what it costs, said once.

A mechanism registers itself at the end of its own file. What stands here is what `choose`
filters by, what `manyheads list` prints and what the contract tests run over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any, Literal

from manyheads.errors import unknown_name

__all__ = ["Mechanism", "Shape", "get_mechanism", "list_mechanisms", "register_mechanism"]

Geometry = Literal["sequence", "grid", "ragged", "graph"]

# One line a mechanism: the name and the file that registers it.
_FILES = {
    "aaren": "manyheads.attention.aaren",
    "clipped_softmax": "manyheads.attention.clipped_softmax",
    "diag": "manyheads.attention.diag",
    "flow": "manyheads.attention.flow",
    "gated": "manyheads.attention.gated",
    "gla": "manyheads.attention.gla",
    "landmark": "manyheads.attention.landmark",
    "lean": "manyheads.attention.lean",
    "mamba": "manyheads.attention.mamba",
    "norm": "manyheads.attention.norm",
    "orchid": "manyheads.attention.orchid",
    "routing": "manyheads.attention.routing",
    "sla": "manyheads.attention.sla",
    "softmax": "manyheads.attention.softmax",
    "urpe": "manyheads.attention.urpe",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes that a cost depends on, for one call on one layer.

    B ``batch``, H ``heads``, N ``length`` (queries and keys alike), D ``head_dim`` (of queries
    and keys), ``value_dim`` (D unless given), ``kv_heads`` (H unless given).
    """

    batch: int = 1
    heads: int = 8
    length: int = 1024
    head_dim: int = 64
    value_dim: int | None = None
    kv_heads: int | None = None
    is_causal: bool = True

    @property
    def dv(self) -> int:
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def hkv(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One attention mechanism and its facts.

    Attributes:
        name: registry name, equal to the file name and the public function's name.
        summary: one line, first what it computes, then what it gives up.
        paper: slug of its card in `manyheads.papers`, or None.
        function: the public function on (B, H, N, D) tensors.
        reference: the definition in plain PyTorch, the oracle of the tests.
        update: `(state, ...) -> (out, state)` for a block of tokens, or None.
        step: `(state, ...) -> (out, state)` for one token at constant cost, or None.
        module: `SequenceMixer` built from `config`.
        config: its config class; `embed_dim`, `num_heads` and `is_causal` exist in all.
        causal, bidirectional, cross: which uses are allowed.
        positional: the module itself knows positions; False: it needs positions from outside.
        geometry: what the tokens lie on.
        exact: True if it equals softmax attention (with its own bias) and not another function.
        constant_state: the decoding state does not grow with the context.
        cost: asymptotic cost of the forward pass in words of N, D and block sizes.
        flops: forward FLOPs (2 a multiply-add) of the function's matrix products, closed form.
        bytes_moved: least bytes read and written by the forward pass (inputs, outputs, states).
        state_numbers: numbers held per layer after `length` tokens of decoding.
        memory_numbers: largest extra numbers alive inside the forward pass, closed form.
        inputs: builds the function's random tensors for a shape, `(Shape, generator) -> dict`.
    """

    name: str
    summary: str
    paper: str | None
    function: Callable[..., Any]
    reference: Callable[..., Any]
    module: type[Any]
    config: type[Any]
    update: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None
    causal: bool
    bidirectional: bool
    cross: bool = False
    positional: bool = False
    geometry: Geometry = "sequence"
    exact: bool
    constant_state: bool
    cost: str
    flops: Callable[[Shape], int]
    bytes_moved: Callable[[Shape], int]
    state_numbers: Callable[[Shape], int]
    memory_numbers: Callable[[Shape], int]
    inputs: Callable[..., dict[str, Any]]
    notes: tuple[str, ...] = field(default=())


_REGISTRY: dict[str, Mechanism] = {}


def register_mechanism(mechanism: Mechanism) -> Mechanism:
    """Enter a mechanism under its name; a name is taken once."""
    if mechanism.name in _REGISTRY:
        raise ValueError(f"mechanism {mechanism.name!r} is registered already")
    _REGISTRY[mechanism.name] = mechanism
    return mechanism


def get_mechanism(name: str) -> Mechanism:
    """Return the mechanism of that name, importing its file if need be.

    Raises:
        ValueError: no such mechanism; the nearest name is given.
    """
    if name not in _REGISTRY and name in _FILES:
        import_module(_FILES[name])
    if name not in _REGISTRY:
        raise unknown_name("mechanism", name, {*_FILES, *_REGISTRY})
    return _REGISTRY[name]


def list_mechanisms(pattern: str = "*") -> list[str]:
    """Return the names of all mechanisms that match a glob pattern, sorted."""
    return sorted(n for n in {*_FILES, *_REGISTRY} if fnmatchcase(n, pattern))
