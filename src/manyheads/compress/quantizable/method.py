"""INT8 post-training quantisation of the linear layers of any model: bytes and time really fall.

Weights are int8 with one scale an output; inputs are quantised by token, or with ranges measured
on calibration batches. Which layers exist, what they see and what they cost is measured first.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.compress.quantizable.estimators import RangeEstimator, Scheme
from manyheads.compress.quantizable.int8 import Int8Linear
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.few_rows import Linear
from manyheads.models.language.quantizable.attention import ActivatedLinear

__all__ = ["Int8", "Int8Config"]

_ROWS = 32  # tokens that layers are timed with where no calibration tells
_REPEATS = 15


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config(Config):
    """Options of INT8 quantisation.

    Attributes:
        inputs: "per_token" (a scale for each token, nothing to calibrate) or "static" (one range
            a layer, from the calibration; no maximum is searched at run time)
        weights: "minmax" or "mse" (the grid of least squared error, for each output)
        percentile: of static ranges, in place of extremes: 99.999 cuts outliers
        skip: glob patterns of paths that stay in floating point, as layers with outliers should
        keep_slower: convert layers that are slower in int8 on this machine as well, for their bytes
    """

    inputs: Literal["per_token", "static"] = "per_token"
    weights: Literal["minmax", "mse"] = "minmax"
    percentile: float | None = None
    skip: tuple[str, ...] = ()
    keep_slower: bool = True

    def __post_init__(self) -> None:
        if self.inputs not in ("per_token", "static"):
            raise unknown_name("inputs", self.inputs, ("per_token", "static"))
        if self.weights not in ("minmax", "mse"):
            raise unknown_name("weights", self.weights, ("minmax", "mse"))
        if self.percentile is not None and self.inputs != "static":
            raise ValueError("percentile is of static ranges: give inputs='static'")
        Scheme(percentile=self.percentile)


class Int8(Procedure):
    """Turn linear layers into 8-bit integers, weights and products (2306.12929). Lossy.

    Embeddings, norms, convolutions and matrices tied to an embedding stay as they are.

    Example:
        >>> from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
        >>> model = MixerLM(MixerLMConfig(embed_dim=32, num_heads=2, mixers="softmax")).eval()
        >>> batch = {"tokens": torch.randint(256, (2, 20))}
        >>> Int8().plan(model, [batch]).apply(model)(**batch).shape
        torch.Size([2, 20, 256])
    """

    name: ClassVar[str] = "int8"
    settings_class: ClassVar[type[Config]] = Int8Config

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Find the layers, the ranges of their inputs, and what int8 costs here.

        Args:
            model: of transformers, timm or ours, on a CPU.
            calibration: batches for ``model(**batch)``, gone through once; "static" needs them,
                without them no error is measured.

        Raises:
            ValueError: no linear layer is left, a pattern of ``skip`` matches nothing, or "static"
                has no batches.
        """
        c = self.settings
        layers, left = _choose(model, c.skip)
        static = c.inputs == "static"
        seen = {path: _Seen(c.percentile if static else None) for path in layers}
        first: tuple[Batch, Tensor | None] | None = None
        with _watching(model, seen, static), torch.no_grad():
            for batch in calibration or ():
                out = _first_tensor(model(**batch))
                first = first or (batch, out)
        if static and first is None:
            raise ValueError("inputs='static' measures ranges: give calibration batches")
        if first is not None:
            for path in [p for p, s in seen.items() if not s.rows]:
                del layers[path]
                left[path] = "not run by the calibration"
            if not layers:
                raise ValueError("the calibration runs no linear layer through its forward")
        times = _time_layers(model, layers, {p: s.typical for p, s in seen.items()}, static)
        slower = sorted(p for p, (before, after) in times.items() if after >= before)
        if not c.keep_slower:
            for path in slower:
                del layers[path]
                left[path] = "slower in int8 here"
            if not layers:
                raise ValueError("every layer is slower in int8 here: nothing would change")
        structure = {"layers": {path: _shape(model, path, static) for path in layers}}
        tensors = {}
        if static:
            for path in layers:
                low, high = seen[path].range
                tensors[f"{path}.input_range"] = torch.stack((low, high)).float()
        plan = self._plan(model, structure, tensors=tensors)
        plan.measured.update(_measured(model, layers, left, times, slower))
        if first is not None and first[1] is not None:
            plan.measured["relative_error"] = _error(plan, model, first[0], first[1])
        return plan

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        """Replace the layers of a model by their int8 forms."""
        for path in plan.structure["layers"]:
            module = model.get_submodule(path)
            ends = plan.tensors.get(f"{path}.input_range")
            most = _least_error(module) if plan.settings["weights"] == "mse" else None
            model.set_submodule(
                path,
                Int8Linear.from_float(
                    module, transposed=_is_transposed(module), most=most,
                    input_range=None if ends is None else (ends[0], ends[1]),
                ),
            )  # fmt: skip
        return model

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        """Put empty int8 layers where a result has them."""
        for path, shape in structure["layers"].items():
            act = getattr(model.get_submodule(path), "act", None)
            model.set_submodule(path, Int8Linear(**shape, act=act).train(model.training))
        return model


class _Seen:
    """What a layer was given: how many rows, and their range."""

    def __init__(self, percentile: float | None) -> None:
        self.rows: list[int] = []
        self._estimator = RangeEstimator(Scheme(estimator="running", percentile=percentile))

    def add(self, x: Tensor, static: bool) -> None:
        self.rows.append(x.numel() // x.shape[-1])
        if static:
            self._estimator.update(x)

    @property
    def typical(self) -> int:
        return int(median(self.rows)) if self.rows else _ROWS

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        assert self._estimator.range is not None
        return self._estimator.range


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _choose(model: nn.Module, skip: tuple[str, ...]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to convert, and why others stay, by path."""
    named = dict(model.named_modules())
    for pattern in skip:
        if not any(fnmatchcase(path, pattern) for path in named):
            raise ValueError(f"skip={pattern!r} matches no module; one is {list(named)[-1]!r}")
    owners: dict[int, int] = {}
    for module in named.values():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for path, module in named.items():
        if not (isinstance(module, nn.Linear) or _is_transposed(module)) or not path:
            continue
        known = type(module) in (nn.Linear, Linear, ActivatedLinear) or _is_transposed(module)
        if any(fnmatchcase(path, pattern) for pattern in skip):
            left[path] = "skip"
        elif not known:
            left[path] = f"a {type(module).__name__}, which its model reads in another way"
        elif owners[id(module.weight)] > 1:
            left[path] = "tied to another layer"
        else:
            layers[path] = module
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer that is left to convert")
    return layers, left


@contextmanager
def _watching(model: nn.Module, seen: dict[str, _Seen], static: bool) -> Iterator[None]:
    handles = []
    for path, record in seen.items():

        def look(_: nn.Module, args: tuple[Any, ...], record: _Seen = record) -> None:
            record.add(args[0], static)

        handles.append(model.get_submodule(path).register_forward_pre_hook(look))
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


def _shape(model: nn.Module, path: str, static: bool) -> dict[str, Any]:
    module = model.get_submodule(path)
    assert isinstance(module.weight, Tensor)
    out_features, in_features = module.weight.shape
    if _is_transposed(module):
        out_features, in_features = in_features, out_features
    bias = getattr(module, "bias", None) is not None
    return {
        "in_features": in_features, "out_features": out_features, "bias": bias, "static": static
    }  # fmt: skip


def _least_error(module: nn.Module) -> Tensor:
    """Return the largest magnitude of each output's best grid."""
    assert isinstance(module.weight, Tensor)
    weight = module.weight.detach().float()
    weight = weight.T if _is_transposed(module) else weight
    scheme = Scheme(symmetric=True, per_channel=True, estimator="mse_grid", margin=0.0)
    # Candidates are shares of the largest magnitude: of each row's own, so rows are scaled to 1.
    rows = weight.abs().amax(1).clamp_min(1e-8)
    _, high = RangeEstimator(scheme).update(weight / rows[:, None])
    return high.float() * rows


def _time_layers(
    model: nn.Module, layers: dict[str, nn.Module], rows: dict[str, int], static: bool
) -> dict[str, tuple[float, float]]:
    """Return seconds before and after of each layer, each size timed once."""
    known: dict[tuple[Any, ...], tuple[float, float]] = {}
    times = {}
    for path, module in layers.items():
        assert isinstance(module.weight, Tensor)
        shape = _shape(model, path, static)
        key = (*shape.values(), rows[path], module.weight.dtype, type(module))
        if key not in known:
            x = torch.randn(max(1, rows[path]), shape["in_features"], dtype=module.weight.dtype)
            ends = (x.min(), x.max()) if static else None
            small = Int8Linear.from_float(
                module, transposed=_is_transposed(module), input_range=ends
            )
            known[key] = _compare(module, small, x)
        times[path] = known[key]
    return times


@torch.no_grad()
def _compare(before: nn.Module, after: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return median seconds of two modules, called by turns so that load falls on both."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(_REPEATS + 2):
        for module, times in zip((before, after), found, strict=True):
            start = time.perf_counter()
            module(x)
            if number >= 2:
                times.append(time.perf_counter() - start)
    return median(found[0]), median(found[1])


def _measured(
    model: nn.Module,
    layers: dict[str, nn.Module],
    left: dict[str, str],
    times: dict[str, tuple[float, float]],
    slower: list[str],
) -> dict[str, Any]:
    before = after = 0
    for path, module in layers.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        before += weight.numel() * weight.element_size()
        after += weight.numel() + 4 * int(_shape(model, path, False)["out_features"])
    total = [sum(times[p][i] for p in layers) for i in (0, 1)]
    notes = []
    if slower:
        notes.append(
            f"{len(slower)} of {len(times)} layers are slower in int8 on this machine, for "
            f"instance {slower[0]!r}: keep_slower=False leaves them in floating point"
        )
    if total[1] >= total[0]:
        notes.append("int8 is slower than floating point on this machine as a whole")
    return {
        "layers": len(layers),
        "left": left,
        "weight_bytes": [before, after],
        "linear_seconds": total,
        "linear_speedup": total[0] / total[1],
        "slower": slower,
        "notes": notes,
    }


@torch.no_grad()
def _error(plan: Plan, model: nn.Module, batch: Batch, expected: Tensor) -> float:
    """Return the relative error of the converted model's first output on a batch."""
    small = Int8.apply(plan, copy.deepcopy(model)).eval()
    out = _first_tensor(small(**batch))
    assert out is not None
    return float((out - expected).double().norm() / expected.double().norm().clamp_min(1e-30))


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    return output[0] if isinstance(output, tuple) and isinstance(output[0], Tensor) else None
