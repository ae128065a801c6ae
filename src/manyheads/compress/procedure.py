"""What every procedure shares: a plan that is data, and how it is made, applied and read again.

A procedure measures a model and decides (``plan``); the plan is saved, read, and applied to that
model as often as one likes. Nothing is changed before ``Plan.apply``, and then a copy.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["Batch", "Plan", "Procedure", "fingerprint", "get_procedure", "list_procedures"]

Batch = Mapping[str, Tensor]

# One line a procedure: the name and the file whose class is the procedure.
_FILES = {
    "a2sf": "manyheads.compress.a2sf:A2SF",
    "h2o": "manyheads.compress.a2sf:H2O",
    "int8": "manyheads.compress.quantizable:Int8",
    "llm-drop": "manyheads.compress.llm_drop:LLMDrop",
    "masa": "manyheads.compress.masa:MASA",
    "minilm": "manyheads.compress.minilm:MiniLM",
    "quamba": "manyheads.compress.quamba:Quamba",
    "sink-recent": "manyheads.compress.a2sf:SinkRecent",
    "snapkv": "manyheads.compress.a2sf:SnapKV",
    "streaming": "manyheads.compress.a2sf:StreamingLLM",
}


def get_procedure(name: str) -> type[Procedure]:
    """Return the procedure's class by its name.

    Raises:
        ValueError: no such procedure; the nearest name is given.
    """
    if name not in _FILES:
        raise unknown_name("method", name, _FILES)
    module, _, attribute = _FILES[name].partition(":")
    found: type[Procedure] = getattr(import_module(module), attribute)
    return found


def list_procedures() -> list[str]:
    """Return the names of all procedures, sorted."""
    return sorted(_FILES)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what tells a model from another: its class, its number of tensors, two hashes.

    ``shapes`` hashes the names and shapes of the state dict, ``values`` up to 64 numbers of each
    tensor, spread over it, so that a model of any size is read in a moment.
    """
    shapes, values = hashlib.sha256(), hashlib.sha256()
    state = model.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue
        shapes.update(f"{name}:{tuple(tensor.shape)};".encode())
        if tensor.numel() and tensor.device.type != "meta":
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 64)][:64]
            values.update(some.to("cpu", torch.float64).numpy().tobytes())
    return {
        "model": type(model).__name__,
        "tensors": len(state),
        "shapes": shapes.hexdigest()[:16],
        "values": values.hexdigest()[:16],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a procedure decided for one model. It is data: saved, read, applied again.

    Attributes:
        method: the procedure's name.
        settings: the procedure's options.
        structure: what the result is built from, plain JSON types alone.
        tensors: numbers too many for JSON (scales, factors), by name.
        measured: what was seen on the way, plain JSON types.
        fingerprint: of the model that was measured, see :func:`fingerprint`.
    """

    method: str
    settings: dict[str, Any]
    structure: dict[str, Any]
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    measured: dict[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Return the smaller or faster model; ``model`` itself is left alone unless ``inplace``.

        Raises:
            ValueError: the plan was made for another model.
        """
        from manyheads.compress.steps import describe, record_step, steps_of

        self.check(model)
        try:
            original, earlier = describe(model), steps_of(model)
        except ValueError:  # of no library: it can be shrunk, and not built again from a folder
            original, earlier = {"library": "", "architecture": type(model).__name__}, []
        target = model if inplace else copy.deepcopy(model)
        result = get_procedure(self.method).apply(self, target)
        step = {"method": self.method, "structure": self.structure}
        return record_step(result, original, earlier, step)

    def check(self, model: nn.Module) -> None:
        """Raise ``ValueError`` unless this is the model that the plan was made for."""
        own = fingerprint(model)
        for field, words in (
            ("model", "a {plan}, and this is a {own}"),
            ("shapes", "a model of other shapes (hash {plan}, this one {own})"),
            ("values", "a model of the same shapes with other weights (hash {plan}, this {own})"),
        ):
            there, here = self.fingerprint.get(field), own[field]
            if there != here:
                said = words.format(plan=there, own=here)
                raise ValueError(
                    f"this {self.method} plan was made for {said}: make a plan for this model"
                )

    def report(self) -> dict[str, Any]:
        """Return what was decided and measured, plain JSON types."""
        return {
            "method": self.method,
            "settings": self.settings,
            "structure": self.structure,
            "measured": self.measured,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, and its tensors beside it as ``<stem>.safetensors``."""
        from safetensors.torch import save_file

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        record = self.report() | {"fingerprint": self.fingerprint, "tensors": bool(self.tensors)}
        if self.tensors:
            kept = {name: t.detach().contiguous() for name, t in self.tensors.items()}
            save_file(kept, str(target.with_suffix(".safetensors")))
        draft = target.with_name(target.name + ".part")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(target)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read the plan that :meth:`save` wrote.

        Raises:
            ValueError: no plan, a method unknown here, or its tensors are missing.
        """
        from safetensors.torch import load_file

        source = Path(path)
        try:
            record = json.loads(source.read_text(encoding="utf-8"))
            record = {key: record[key] for key in (*_JSON_FIELDS, "tensors")}
        except FileNotFoundError:
            raise ValueError(f"no plan at {str(source)!r}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(source)!r} is no plan: {error}") from None
        get_procedure(record["method"])
        tensors = {}
        if record.pop("tensors"):
            beside = source.with_suffix(".safetensors")
            if not beside.is_file():
                raise ValueError(f"the plan {str(source)!r} needs {beside.name} beside it")
            tensors = load_file(str(beside))
        return cls(**record, tensors=tensors)


_JSON_FIELDS = ("method", "settings", "structure", "measured", "fingerprint")


class Procedure:
    """Base of procedures: keyword options in ``settings``, a plan, and what the plan does.

    A procedure gives :meth:`plan`, :meth:`apply` and :meth:`restructure`. Options may be given
    one by one or as a settings object: ``LLMDrop(attention=2)``.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Config]]
    acts_on_cache: ClassVar[bool] = False  # what it loses shows in decoding alone

    def __init__(self, settings: Config | None = None, **options: Any) -> None:
        if settings is not None and options:
            raise ValueError(f"{type(self).__name__} takes settings or options, not both")
        self.settings: Any = settings or self.settings_class.from_dict(options)

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Measure and decide; the model is not changed.

        Args:
            model: the model to shrink.
            calibration: batches for ``model(**batch)``, gone through once.
        """
        raise NotImplementedError

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        """Do what the plan says to ``model``, which may be edited, and return the result."""
        raise NotImplementedError

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        """Give a freshly built model of the original architecture the result's shape.

        The state dict of an applied model loads into it strictly.
        """
        raise NotImplementedError

    @classmethod
    def candidates(cls, model: nn.Module, given: dict[str, Any]) -> list[dict[str, Any]]:
        """Return settings from mild to strong for a search; empty where there is nothing to try.

        Args:
            model: to be shrunk.
            given: settings that are fixed already.
        """
        return []

    @classmethod
    def is_stock(cls, structure: dict[str, Any], model: nn.Module) -> bool:
        """Return whether the original library's own class can express the result."""
        return False

    def _plan(
        self,
        model: nn.Module,
        structure: dict[str, Any],
        *,
        tensors: dict[str, Tensor] | None = None,
        measured: dict[str, Any] | None = None,
    ) -> Plan:
        return Plan(
            method=self.name,
            settings=self.settings.to_dict(),
            structure=structure,
            tensors=tensors or {},
            measured=measured or {},
            fingerprint=fingerprint(model),
        )
