"""One pass over the calibration: mean hidden states, and second moments of projections' inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.compress.anatomy import Anatomy
from manyheads.compress.llm_drop.similarity import BlockMasks
from manyheads.compress.procedure import Batch

__all__ = ["Statistics", "measure_statistics", "output_matrix"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the conversion needs to know of data, in float64.

    Attributes:
        means: by block's path, its mean output (C,) over samples and real tokens.
        moments: by module's path, XᵀX / n (I, I) of its inputs; modules that read the same
            tensor hold the same one.
        tokens: real tokens that the first block saw.
    """

    means: dict[str, Tensor]
    moments: dict[str, Tensor]
    tokens: int


class _Sums(ExitStack):
    """Hooks that add up; one moment for modules that read the very same tensor."""

    def __init__(self, model: nn.Module, parts: Anatomy, paths: Mapping[str, str]) -> None:
        super().__init__()
        self.means: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.same: dict[str, str] = {}
        self._masks = self.enter_context(BlockMasks(model, parts))
        self._last: tuple[str, Tensor] | None = None
        for block in parts.blocks:
            module = model.get_submodule(block.path)
            handle = module.register_forward_hook(self._leaving(block.path, block.role))
            self.callback(handle.remove)
        for path, role in paths.items():
            module = model.get_submodule(path)
            handle = module.register_forward_pre_hook(self._entering(path, role))
            self.callback(handle.remove)

    def begin(self, batch: Batch) -> None:
        self._masks.begin(batch)
        self._last = None

    def _rows(self, value: Any, role: str) -> Tensor:
        while not isinstance(value, Tensor):
            value = value[0]
        rows = value.detach().reshape(-1, value.shape[-1])
        mask = self._masks.real(role, len(rows))
        return (rows if mask is None else rows[mask]).double()

    def _leaving(self, path: str, role: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            rows = self._rows(output, role)
            self.means[path] = self.means.get(path, 0) + rows.sum(0)
            self.counts[path] = self.counts.get(path, 0) + len(rows)

        return hook

    def _entering(self, path: str, role: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            again = self._last is not None and args[0] is self._last[1]
            if again and path not in self.moments:
                assert self._last is not None
                self.same[path] = self._last[0]
                return
            rows = self._rows(args[0], role)
            self.moments[path] = self.moments.get(path, 0) + rows.mT @ rows
            self.counts[path] = self.counts.get(path, 0) + len(rows)
            self._last = path, args[0]

        return hook


def measure_statistics(
    model: nn.Module, batches: Iterable[Batch], parts: Anatomy, paths: Mapping[str, str]
) -> Statistics:
    """Run the model over the batches once, in eval mode.

    Args:
        model: put back into its mode after the pass.
        batches: each for ``model(**batch)``; a mask among them excludes padding.
        parts: the model's anatomy.
        paths: of the projections, with their block's role.

    Raises:
        ValueError: no batches, or numbers that are not finite.
    """
    sums, training, seen = _Sums(model, parts, paths), model.training, 0
    model.eval()
    try:
        with torch.no_grad(), sums:
            for batch in batches:
                sums.begin(batch)
                model(**batch)
                seen += 1
    finally:
        model.train(training)
    if not seen:
        raise ValueError("the calibration holds no batches: give at least one")
    means = {path: total / max(1, sums.counts[path]) for path, total in sums.means.items()}
    moments = {path: total / max(1, sums.counts[path]) for path, total in sums.moments.items()}
    for path, tensor in (means | moments).items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path!r} gives NaN or infinity on the calibration: look at the model's "
                "precision and its inputs"
            )
    moments |= {path: moments[other] for path, other in sums.same.items()}
    return Statistics(means=means, moments=moments, tokens=sums.counts[parts.blocks[0].path])


def output_matrix(model: nn.Module, channels: int) -> Tensor:
    """Return the matrix (V, C) that turns hidden states into logits of tokens or classes.

    Of a model without one, such as a bare BERT, its input embedding, which BERT ties to it.

    Raises:
        ValueError: no such matrix of that width.
    """
    found: list[Any] = []
    for name in ("get_output_embeddings", "get_classifier", "get_input_embeddings"):
        ask = getattr(model, name, None)
        if callable(ask):
            try:
                found.append(ask())
            except (AttributeError, NotImplementedError):  # models without a head say so this way
                continue
        if name == "get_classifier":
            found += [getattr(model, n, None) for n in ("head", "classifier")]
    for module in found:
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == channels:
            return weight.detach()
    raise ValueError(
        f"{type(model).__name__} has no matrix from {channels} channels to logits, which layers "
        "are grouped by: give groups=1"
    )
