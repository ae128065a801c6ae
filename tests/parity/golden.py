"""Reading golden files and comparing with them, by the rules of the format (docs/parity.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

__all__ = [
    "ADAPTERS",
    "KEYS",
    "NOT_YET",
    "Golden",
    "adapter",
    "check",
    "golden_files",
    "keys",
    "not_yet",
]

RMS_LIMIT = 1e-3

Adapter = Callable[["Golden"], dict[str, Tensor]]
ADAPTERS: dict[tuple[str, str], Adapter] = {}
NOT_YET: set[tuple[str, str]] = set()
# Of procedures: builds the result that a key list describes, from the list.
KEYS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {}


def adapter(system: str, *kinds: str) -> Callable[[Adapter], Adapter]:
    """Register a function that runs files of these kinds and returns ``out.*`` and ``grad.*``."""

    def enter(fn: Adapter) -> Adapter:
        for kind in kinds:
            assert (system, kind) not in ADAPTERS, f"two adapters for {system}/{kind}"
            ADAPTERS[system, kind] = fn
        return fn

    return enter


def keys(system: str) -> Callable[[Callable[[dict[str, Any]], nn.Module]], Any]:
    """Register what builds, on the meta device, the model that a procedure's key list describes."""

    def enter(fn: Callable[[dict[str, Any]], nn.Module]) -> Any:
        KEYS[system] = fn
        return fn

    return enter


def not_yet(system: str, *kinds: str) -> None:
    """Name the kinds of a paper that is in only in part: they are skipped by name.

    A kind that is neither here nor has an adapter still fails.
    """
    NOT_YET.update((system, kind) for kind in kinds)


@dataclass
class Golden:
    """One file: its metadata and its tensors by the part before the first dot."""

    path: Path
    meta: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Golden:
        with safe_open(path, "pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            golden = cls(path, dict(file.metadata()), tensors)
        for name, tensor in golden.tensors.items():
            if tensor.dtype == torch.float16:
                golden.tensors[name] = tensor.float()
        return golden

    def _part(self, prefix: str) -> dict[str, Tensor]:
        cut = len(prefix) + 1
        return {k[cut:]: t for k, t in self.tensors.items() if k.startswith(prefix + ".")}

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return self._part("in")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self._part("w")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return self._part("out")

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self.meta["config"])

    def options(self, *dropped: str, **renamed: str) -> dict[str, Any]:
        """Return the config under our names; a key that is neither dropped nor renamed fails.

        ``renamed`` maps official keys to ours.
        """
        unknown = set(self.config) - set(dropped) - set(renamed)
        assert not unknown, f"the adapter does not know the config keys {sorted(unknown)}"
        return {renamed[k]: v for k, v in self.config.items() if k in renamed}

    def leaves(self, *names: str) -> list[Tensor]:
        """Return the inputs of these names as leaves that collect gradients."""
        return [self.inputs[n].clone().requires_grad_() for n in names]


def golden_files(folder: Path) -> Iterator[Path]:
    """Yield every golden file below a folder, sorted."""
    return iter(sorted(folder.glob("*/*.safetensors")))


def check(golden: Golden, results: dict[str, Tensor]) -> None:
    """Compare results with all outputs and gradients of a file.

    Every tensor that is neither an input nor a weight must be among the results, within its
    limit; integers and booleans equal exactly; NaN and infinities in the same places.
    """
    wanted = {k for k in golden.tensors if k.partition(".")[0] not in ("in", "w")}
    wanted = {k for k in wanted if not k.startswith("w_")}
    assert wanted, "the file holds nothing to compare"
    missing = sorted(wanted - set(results))
    assert not missing, f"the adapter returned no {missing}"
    failures = [m for k in sorted(wanted) if (m := _difference(golden, k, results[k]))]
    assert not failures, "\n".join(failures)


def _limits(golden: Golden, name: str, expected: Tensor) -> tuple[float, float, bool]:
    """Return the absolute limit, the share of elements that may exceed it, whether it is listed."""
    gradient = name.startswith("grad")
    base = float(golden.meta["grad_atol" if gradient else "atol"])
    share, listed = 0.0, False
    for pattern, limit in json.loads(golden.meta.get("atols") or "{}").items():
        if fnmatchcase(name, pattern) or name == pattern:
            listed = True
            base, share = limit if isinstance(limit, list) else (limit, 0.0)
    finite = expected[torch.isfinite(expected)] if expected.is_floating_point() else expected
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if gradient:
        base *= max(1.0, largest)
    elif golden.meta.get("relative") == "true":
        base *= largest
    return base, share, listed


def _difference(golden: Golden, name: str, actual: Tensor) -> str | None:
    expected = golden.tensors[name]
    actual = actual.detach()
    if expected.numel() == 1 and actual.numel() == 1:
        actual = actual.reshape(expected.shape)
    if actual.shape != expected.shape:
        return f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.dtype == torch.bool:
        return None if torch.equal(actual.bool(), expected) else f"{name}: booleans differ"
    limit, share, listed = _limits(golden, name, expected.double())
    if not expected.is_floating_point():
        if listed:
            beyond = (actual.double() - expected.double()).abs() > limit
            return None if beyond.double().mean() <= share else f"{name}: integers differ"
        return None if torch.equal(actual.long(), expected.long()) else f"{name}: integers differ"
    a, e = actual.double(), expected.double()
    finite = torch.isfinite(e)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
        a[~finite].nan_to_num(nan=1.5), e[~finite].nan_to_num(nan=1.5)
    ):
        return f"{name}: NaN or infinities stand in other places"
    difference = (a[finite] - e[finite]).abs()
    if not difference.numel():
        return None
    beyond = (difference > limit).double().mean().item()
    if beyond > share:
        worst = difference.max().item()
        return f"{name}: largest difference {worst:.2e}, limit {limit:.2e} ({beyond:.1%} beyond)"
    scale = e[finite].square().mean().sqrt()
    error = difference.square().mean().sqrt()
    if not listed and scale > 0 and error >= RMS_LIMIT * scale:
        return f"{name}: rms error {error / scale:.2e} of the rms value, limit {RMS_LIMIT:.0e}"
    return None
