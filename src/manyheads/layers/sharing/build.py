"""Putting shared layers into a model, and taking them out. S atoms, L layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.sharing.dictionary import AtomDictionary, CoefficientNetwork
from manyheads.layers.sharing.linear import LowRankLinear, SharedLinear

__all__ = [
    "ATOMS",
    "PROJECTIONS",
    "AtomStore",
    "Part",
    "SharingConfig",
    "Slot",
    "install",
    "named_slots",
    "share",
    "slot_weight",
    "store_coefficients",
    "to_dense",
]

PROJECTIONS = ("query", "key", "value", "output")
M = TypeVar("M", bound=nn.Module)

ATOMS = "shared_atoms"  # the attribute of a model that holds its dictionaries
_LEAVES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "output"}
_KINDS = ("masa", "repeat", "sequential", "low-rank")


@dataclass(frozen=True, kw_only=True, slots=True)
class SharingConfig(Config):
    """How layers share the matrices of their attention.

    Attributes:
        atoms: S, matrices that the layers of a model have between them, for each projection;
            a third of the layers takes two thirds of the parameters.
        kind: masa, every layer a mixture of all atoms; the paper's baselines of the same size:
            repeat, layer l uses atom l mod S; sequential, runs of consecutive layers use one;
            low-rank, every layer has two factors of its own.
        projections: which matrices are shared, of query, key, value, output. Sharing the output
            costs a language model most.
        coefficients: of masa, direct or network (an MLP on a vector a layer, for training;
            ``store_coefficients`` replaces it).
    """

    atoms: int
    kind: Literal["masa", "repeat", "sequential", "low-rank"] = "masa"
    projections: tuple[str, ...] = PROJECTIONS
    coefficients: Literal["direct", "network"] = "direct"

    def __post_init__(self) -> None:
        if self.atoms < 1:
            raise ValueError(f"atoms is {self.atoms}: give 1 or more")
        if self.kind not in _KINDS:
            raise unknown_name("kind of sharing", self.kind, _KINDS)
        if self.coefficients not in ("direct", "network"):
            raise unknown_name("coefficients", self.coefficients, ("direct", "network"))
        for name in self.projections:
            if name not in PROJECTIONS:
                raise unknown_name("projection", name, PROJECTIONS)
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(f"projections {self.projections} must name each matrix once")


class Slot(NamedTuple):
    """A matrix in a model: the path of its module, which of its ``parts`` equal slices of outputs
    it is, and whether that module's weight is (in, out).
    """

    path: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


class Part(NamedTuple):
    """What a part of a layer's outputs is mixed from: a dictionary's name, the layer's row in it,
    and the rank of its correction.
    """

    dictionary: str
    row: int
    rank: int = 0


class AtomStore(nn.ModuleDict):
    """The dictionaries of a model, by name."""


def named_slots(model: nn.Module) -> dict[str, list[Slot]]:
    """Return the projections of our own layers' mixers, those that are named as softmax's are."""
    found: dict[str, list[Slot]] = {}
    for path, module in model.named_modules():
        _, _, leaf = path.rpartition(".mixer.")
        if leaf in _LEAVES and isinstance(module, nn.Linear):
            found.setdefault(_LEAVES[leaf], []).append(Slot(path))
    return found


def slot_weight(model: nn.Module, slot: Slot) -> Tensor:
    """Return the matrix (O, I) of a slot, as it stands in the model.

    Raises:
        ValueError: the module there has no matrix.
    """
    weight = getattr(model.get_submodule(slot.path), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{slot.path} is no linear layer: its matrix cannot be shared")
    weight = weight.mT if slot.transposed else weight
    return weight.chunk(slot.parts)[slot.part]


def share(
    model: nn.Module, slots: Mapping[str, Sequence[Slot]], config: SharingConfig
) -> nn.Module:
    """Replace linear layers by ones that share their matrices, in place. Needs training after.

    The atoms start as matrices of the first layers and each layer's coefficients as a direction
    drawn evenly, of length 1 (of one atom: N(0, 1)), so that mixed matrices start with the variance
    that the model's own have. Layers whose matrices have
    another shape share among themselves.

    Args:
        model: built, not trained: what its matrices were is gone.
        slots: of each projection that ``config`` names, the matrices of all layers in order.
        config: what to share, and how.

    Returns:
        ``model``; its dictionaries are ``model.shared_atoms``.

    Raises:
        ValueError: a projection without slots, fewer layers than atoms, or a fused matrix of
            which only a part would be shared.
    """
    dictionaries: dict[str, AtomDictionary] = {}
    modules: dict[str, dict[int, Part]] = {}
    counts: dict[str, int] = {}
    for name in config.projections:
        shapes: dict[tuple[int, ...], list[Slot]] = {}
        for slot in slots.get(name, ()):
            shapes.setdefault(tuple(slot_weight(model, slot).shape), []).append(slot)
        if not shapes:
            raise ValueError(f"the model has no {name} matrices to share: leave {name!r} out")
        for group, members in enumerate(shapes.values()):
            if len(members) < config.atoms:
                raise ValueError(
                    f"{config.atoms} atoms for {len(members)} layers with {name} matrices of one "
                    "shape: give fewer atoms or more layers"
                )
            key = name if len(shapes) == 1 else f"{name}_{group}"
            if config.kind != "low-rank":
                dictionaries[key] = _dictionary(model, members, config)
            for row, slot in enumerate(members):
                modules.setdefault(slot.path, {})[slot.part] = Part(key, row)
                counts[slot.path] = slot.parts
    for path, parts in modules.items():
        if len(parts) < counts[path]:
            raise ValueError(
                f"{path} holds {counts[path]} matrices in one and only {len(parts)} would be "
                "shared: name all of them in projections"
            )
    if config.kind == "low-rank":
        return _low_rank(model, slots, config)
    ordered = {path: [parts[i] for i in sorted(parts)] for path, parts in modules.items()}
    return install(model, dictionaries, ordered)


def _dictionary(model: nn.Module, members: Sequence[Slot], config: SharingConfig) -> AtomDictionary:
    count, layers = config.atoms, len(members)
    atoms = torch.stack([slot_weight(model, s).detach() for s in members[:count]])
    if config.kind != "masa":
        rows = torch.arange(layers)
        chosen = rows % count if config.kind == "repeat" else rows * count // layers
        one_hot = torch.eye(count, dtype=atoms.dtype)[chosen].to(atoms.device)
        return AtomDictionary(atoms, one_hot, trained=False)
    if config.coefficients == "network":
        network = CoefficientNetwork(layers, count).to(atoms)
        return AtomDictionary(atoms, network)
    drawn = torch.randn(layers, count, dtype=atoms.dtype, device=atoms.device)
    if count > 1:  # of few atoms some layers would draw next to nothing, and learn late
        drawn = drawn / drawn.norm(dim=1, keepdim=True)
    return AtomDictionary(atoms, drawn)


def _low_rank(
    model: nn.Module, slots: Mapping[str, Sequence[Slot]], config: SharingConfig
) -> nn.Module:
    """Give every layer two factors with as many numbers as its share of the atoms has."""
    for name in config.projections:
        for slot in slots[name]:
            if slot.parts > 1:
                raise ValueError(f"{slot.path} holds several matrices in one: low-rank needs each")
            outputs, inputs = slot_weight(model, slot).shape
            rank = outputs * inputs * config.atoms // ((outputs + inputs) * len(slots[name]))
            old = model.get_submodule(slot.path)
            bias = getattr(old, "bias", None) is not None
            new = LowRankLinear(inputs, outputs, max(1, rank), bias=bias)
            new = new.to(next(old.parameters()))
            with torch.no_grad():  # models shrink some matrices: the product starts as they do
                new.up.weight.mul_(slot_weight(model, slot).std() / new.weight.std())
            model.set_submodule(slot.path, new)
    return model


def install(
    model: nn.Module,
    dictionaries: Mapping[str, AtomDictionary],
    modules: Mapping[str, Sequence[Part]],
    *,
    keep: bool = True,
) -> nn.Module:
    """Put shared layers at the paths of linear ones, in place; biases stay.

    Args:
        model: whose ``shared_atoms`` will hold the dictionaries.
        dictionaries: by name.
        modules: of each path, what its outputs are mixed from, in order.
        keep: see :class:`SharedLinear`.

    Raises:
        ValueError: the model shares atoms already.
    """
    if hasattr(model, ATOMS):
        raise ValueError("the model has shared atoms already: make it dense first (to_dense)")
    for path, parts in modules.items():
        old = model.get_submodule(path)
        bias = cast("Tensor | None", getattr(old, "bias", None))
        new = SharedLinear(
            [(dictionaries[p.dictionary], p.row) for p in parts],
            bias=bias,
            ranks=[p.rank for p in parts],
            keep=keep,
        )
        if new.bias is not None and bias is not None:
            new.bias.requires_grad_(bias.requires_grad)
        model.set_submodule(path, new.train(old.training))
    model.add_module(ATOMS, AtomStore(dict(dictionaries)).train(model.training))
    return model


def store_coefficients(model: M) -> M:
    """Replace the networks that make coefficients by the tables they make, in place.

    Outputs stay the same to the bit; optimisers have to be made anew.
    """
    for module in model.modules():
        if isinstance(module, AtomDictionary):
            module.store_coefficients()
    return model


def to_dense(model: M) -> M:
    """Replace shared layers by ``nn.Linear`` with the same matrices, in place; exact.

    The result computes what the model computes and has no atoms: as many parameters as a model
    that never shared.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, SharedLinear):
            model.set_submodule(path, module.to_dense())
    if hasattr(model, ATOMS):
        delattr(model, ATOMS)
    return model
