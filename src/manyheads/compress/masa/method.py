"""MASA on a model that exists: its attention matrices become mixtures of shared atoms.

Lossy, training-free. "Share Your Attention" (arXiv 2508.04581): layers are grouped by how little
they move the distribution over tokens; the matrices of a group become combinations of the atoms
that matrix PCA finds; each gets a low-rank correction that is best on the calibration's inputs.
The attention's parameters fall by ``ratio``; MLPs and embeddings stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from manyheads.compress.anatomy import Anatomy, Block, anatomy
from manyheads.compress.masa.choose import Family, Shared, fits, solve
from manyheads.compress.masa.mathematics import kl_drift, runs_of_layers
from manyheads.compress.masa.slots import attention_slots, check_whole
from manyheads.compress.masa.statistics import Statistics, measure_statistics, output_matrix
from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.sharing import (
    PROJECTIONS,
    AtomDictionary,
    Part,
    SharedLinear,
    SharingConfig,
    Slot,
    install,
    slot_weight,
)

__all__ = ["MASA", "MASAConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MASAConfig(Config):
    """Options of the conversion.

    Attributes:
        ratio: share of the numbers in these matrices that goes, between 0 and 1
        projections: which matrices are shared: query, key, value, output
        groups: runs of layers that share, in each stack; 0: a quarter of the layers, or as many
            fewer as the ratio asks for
        atoms: of each group and projection; 0: the number that loses least
        allocation: of the corrections' ranks, greedy or uniform
        keep: mix a matrix once in evaluation and keep it: the speed and the working memory of
            the dense model
    """

    ratio: float = 0.2
    projections: tuple[str, ...] = PROJECTIONS
    groups: int = 0
    atoms: int = 0
    allocation: Literal["greedy", "uniform"] = "greedy"
    keep: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}: give a share above 0 and below 1")
        SharingConfig(atoms=max(1, self.atoms), projections=self.projections)
        for name in ("groups", "atoms"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 (chosen here) or more")
        if self.allocation not in ("greedy", "uniform"):
            raise unknown_name("allocation", self.allocation, ("greedy", "uniform"))


class MASA(Procedure):
    """Share attention matrices between layers. Lossy, needs no training.

    Example:
        >>> plan = MASA(ratio=0.2).plan(model, batches)
        >>> smaller = plan.apply(model)
    """

    name: ClassVar[str] = "masa"
    settings_class: ClassVar[type[Config]] = MASAConfig
    settings: MASAConfig

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Measure inputs and drift over the calibration, and decide what is shared by whom.

        Raises:
            ValueError: no calibration, a model that is not recognised or shares already, or a
                ratio that one atom a group does not reach.
        """
        c = self.settings
        parts = anatomy(model)
        slots = attention_slots(model, parts, c.projections)
        if calibration is None:
            raise ValueError("masa weighs errors by a model's inputs: give calibration batches")
        roles = {b.path: b.role for b in parts.blocks}
        paths = {
            slot.path: roles[block] for name in c.projections for block, slot in slots[name].items()
        }
        found = measure_statistics(model, calibration, parts, paths)
        drift = {s: _drift(model, parts.stack(s), found, c.groups) for s in parts.stacks}
        solved, runs = self._solve(model, parts, slots, found, drift)
        return self._record(model, solved, slots, runs, drift, found)

    def _solve(
        self,
        model: nn.Module,
        parts: Anatomy,
        slots: dict[str, dict[str, Slot]],
        found: Statistics,
        drift: dict[str, Tensor],
    ) -> tuple[list[Shared], dict[str, list[list[int]]]]:
        """Cut into groups; where their number is ours to choose, fewer until the ratio fits."""
        c = self.settings
        total = sum(slot_weight(model, s).numel() for own in slots.values() for s in own.values())
        longest = max(len(d) + 1 for d in drift.values())
        for count in range(c.groups or max(1, longest // 4), 0, -1):
            runs = {s: runs_of_layers(d, min(count, len(d) + 1)) for s, d in drift.items()}
            families = _families(model, parts, slots, found, runs)
            alone = total - sum(f.numbers for f in families)
            budget = int((1 - c.ratio) * total) - alone
            if families and budget > 0:
                solved = solve(families, budget, atoms=c.atoms, allocation=c.allocation)
                if solved is not None:
                    return solved, runs
            if c.groups:
                break
        raise ValueError(
            f"ratio {c.ratio} leaves fewer numbers than the atoms of the groups take"
            f"{f' (groups={c.groups})' if c.groups else ''}: give a smaller ratio, fewer groups "
            "or fewer atoms"
        )

    def _record(
        self,
        model: nn.Module,
        solved: Sequence[Shared],
        slots: dict[str, dict[str, Slot]],
        runs: dict[str, list[list[int]]],
        drift: dict[str, Tensor],
        found: Statistics,
    ) -> Plan:
        dictionaries: dict[str, Any] = {}
        modules: dict[str, dict[int, tuple[str, int, int]]] = {}
        tensors: dict[str, Tensor] = {}
        for shared in solved:
            own, name = shared.family, shared.family.name
            count, (layers, inputs, outputs) = len(shared.pca.atoms), own.matrices.shape
            dictionaries[name] = {"atoms": count, "layers": layers, "shape": [outputs, inputs]}
            tensors[f"{name}.atoms"] = shared.pca.atoms.mT
            tensors[f"{name}.coefficients"] = shared.pca.coefficients
            for row, (slot, factors) in enumerate(zip(own.slots, shared.factors, strict=True)):
                rank = shared.ranks[row]
                modules.setdefault(slot.path, {})[slot.part] = (name, row, rank)
                if factors is not None:
                    tensors[f"{slot.path}.down.{slot.part}"] = factors[0].mT
                    tensors[f"{slot.path}.up.{slot.part}"] = factors[1].mT
        check_whole(slots, modules)
        before = sum(slot_weight(model, s).numel() for own in slots.values() for s in own.values())
        saved = sum(s.family.numbers for s in solved) - sum(t.numel() for t in tensors.values())
        return self._plan(
            model,
            {
                "dictionaries": dictionaries,
                "modules": {p: [list(m[i]) for i in sorted(m)] for p, m in modules.items()},
                "keep": self.settings.keep,
            },
            tensors={name: t.float().contiguous() for name, t in tensors.items()},
            measured={
                "attention_numbers": {"before": before, "after": before - saved},
                "drift": {stack: d.tolist() for stack, d in drift.items()},
                "groups": runs,
                "lost_energy": dict(fits(solved)),
                "tokens": found.tokens,
            },
        )

    @classmethod
    def candidates(cls, model: nn.Module, given: dict[str, Any]) -> list[dict[str, Any]]:
        if "ratio" in given:
            return [given]
        return [given | {"ratio": tenths / 10} for tenths in range(1, 8)]

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        return _build(plan.structure, model, plan.tensors)

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        return _build(structure, model, {})


def _drift(model: nn.Module, blocks: Sequence[Block], found: Statistics, groups: int) -> Tensor:
    means = torch.stack([found.means[b.path] for b in blocks])
    if groups == 1 or len(blocks) == 1:
        return means.new_zeros(len(blocks) - 1)
    return kl_drift(means, output_matrix(model, means.shape[1]).to(means))[1]


def _families(
    model: nn.Module,
    parts: Anatomy,
    slots: dict[str, dict[str, Slot]],
    found: Statistics,
    runs: dict[str, list[list[int]]],
) -> list[Family]:
    """Collect what can share: two matrices or more of one projection, shape and run of layers."""
    families: list[Family] = []
    for name, own in slots.items():
        number = 0
        for stack, groups in runs.items():
            blocks = parts.stack(stack)
            for group in groups:
                shapes: dict[tuple[int, ...], list[Slot]] = {}
                for slot in (own[blocks[i].path] for i in group if blocks[i].path in own):
                    shapes.setdefault(tuple(slot_weight(model, slot).shape), []).append(slot)
                for members in (m for m in shapes.values() if len(m) > 1):
                    weights = [slot_weight(model, s).detach().double().mT for s in members]
                    families.append(
                        Family(
                            name=f"{name}_{number}",
                            slots=members,
                            matrices=torch.stack(weights),
                            moments=[found.moments[s.path] for s in members],
                        )
                    )
                    number += 1
    return families


def _build(structure: dict[str, Any], model: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """Install shared layers; zeros where no values are given."""
    modules = {
        path: [Part(name, row, rank) for name, row, rank in parts]
        for path, parts in structure["modules"].items()
    }
    like = {p.dictionary: model.get_submodule(path) for path, own in modules.items() for p in own}
    dictionaries: dict[str, AtomDictionary] = {}
    for name, sizes in structure["dictionaries"].items():
        weight = next(like[name].parameters())
        count, layers = sizes["atoms"], sizes["layers"]
        atoms = weight.new_zeros(count, *sizes["shape"])
        coefficients = weight.new_zeros(layers, count)
        if values:
            atoms.copy_(values[f"{name}.atoms"])
            coefficients.copy_(values[f"{name}.coefficients"])
        dictionaries[name] = AtomDictionary(atoms, coefficients)
    install(model, dictionaries, modules, keep=structure["keep"])
    with torch.no_grad():
        for path, own in modules.items() if values else ():
            layer = model.get_submodule(path)
            assert isinstance(layer, SharedLinear)
            for part in (i for i, p in enumerate(own) if p.rank):
                layer.down[str(part)].copy_(values[f"{path}.down.{part}"])
                layer.up[str(part)].copy_(values[f"{path}.up.{part}"])
    return model
