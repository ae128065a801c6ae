"""Outliers of activations: the largest magnitude and the kurtosis, by module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Outliers", "inf_norm", "kurtosis", "measure_outliers"]


def inf_norm(x: Tensor) -> Tensor:
    """Return max |x| of each sample: (B, ...) to (B,)."""
    return x.reshape(x.shape[0], -1).abs().amax(1)


def kurtosis(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Return mean((x − μ)⁴) / (σ⁴ + eps) of each sample, σ unbiased: (B, ...) to (B,).

    About 3 for a normal distribution. All numbers of a sample are taken together, so that one
    token far out is enough.
    """
    rows = x.reshape(x.shape[0], -1)
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / (rows.std(1).pow(4) + eps)


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Averages over samples, by the path of the module whose output was looked at."""

    inf_norms: dict[str, float]
    kurtoses: dict[str, float]

    @property
    def max_inf_norm(self) -> float:
        """The largest of all modules."""
        return max(self.inf_norms.values())

    @property
    def avg_kurtosis(self) -> float:
        """The mean of all modules."""
        return sum(self.kurtoses.values()) / len(self.kurtoses)

    @property
    def max_kurtosis(self) -> float:
        """The largest of all modules."""
        return max(self.kurtoses.values())

    def summary(self) -> dict[str, float]:
        """Return the three figures that papers quote."""
        names = ("max_inf_norm", "avg_kurtosis", "max_kurtosis")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def measure_outliers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    modules: Iterable[str] | None = None,
) -> Outliers:
    """Run batches through a model, in eval mode, and look at the outputs of its modules.

    Args:
        model: of any library.
        batches: each is given to ``model(**batch)``.
        modules: glob patterns of paths, for instance "*.output.dense"; None for all linear layers
            and norms but the last linear layer (logits).

    Raises:
        ValueError: no batches, or no module matches.
    """
    paths = _tracked(model, modules)
    sums: dict[str, list[float]] = {p: [0.0, 0.0, 0.0] for p in paths}
    handles = []
    for path in paths:

        def look(_: nn.Module, __: Any, output: Any, path: str = path) -> None:
            x = (output[0] if isinstance(output, tuple) else output).float()
            for place, value in enumerate((inf_norm(x).sum(), kurtosis(x).sum(), x.shape[0])):
                sums[path][place] += float(value)

        handles.append(model.get_submodule(path).register_forward_hook(look))
    training = model.training
    model.eval()
    try:
        seen = 0
        for batch in batches:
            model(**batch)
            seen += 1
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError("no batches to measure outliers on: give at least one")
    reached = {p: s for p, s in sums.items() if s[2]}
    return Outliers(
        inf_norms={p: s[0] / s[2] for p, s in reached.items()},
        kurtoses={p: s[1] / s[2] for p, s in reached.items()},
    )


def _tracked(model: nn.Module, patterns: Iterable[str] | None) -> list[str]:
    named = dict(model.named_modules())
    if patterns is None:
        linear = [p for p, m in named.items() if isinstance(m, nn.Linear)]
        head = {linear[-1]} if len(linear) > 1 else set()
        return [
            p for p, m in named.items()
            if p not in head and (isinstance(m, nn.Linear) or "Norm" in type(m).__name__)
        ]  # fmt: skip
    wanted = list(patterns)
    found = [p for p in named if any(fnmatchcase(p, pattern) for pattern in wanted)]
    if not found:
        raise ValueError(
            f"no module matches {', '.join(wanted)}; paths look like {list(named)[-1]!r}"
        )
    return found
