"""What is shared by which layers, and with how many atoms and ranks, under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manyheads.compress.masa.mathematics import (
    MatrixPCA,
    allocate_ranks,
    cholesky_root,
    low_rank_refinement,
    matrix_pca,
)
from manyheads.layers.sharing import Slot

__all__ = ["Family", "Shared", "solve"]


@dataclass(kw_only=True)
class Family:
    """Matrices of one projection and one shape in a run of layers.

    Attributes:
        name: of the dictionary.
        slots: where they lie, in order of layers.
        matrices: (L, I, O) in float64.
        moments: (I, I) of each one's inputs.
    """

    name: str
    slots: list[Slot]
    matrices: Tensor
    moments: list[Tensor]
    roots: list[Tensor] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        return self.matrices.numel()

    def cost(self, atoms: int) -> int:
        """Numbers of so many atoms and their coefficients."""
        return atoms * (self.matrices[0].numel() + len(self.matrices))

    @property
    def rank_cost(self) -> int:
        _, inputs, outputs = self.matrices.shape
        return inputs + outputs

    def spectra(self, pca: MatrixPCA) -> list[Tensor]:
        """Return singular values of every whitened residual; squared, they are shares of the
        energy of the layer's outputs.

        Energies as they are would leave the matrices that read small numbers, such as what
        attention has averaged, without ranks.
        """
        left = self.matrices - pca.reconstruction()
        found = []
        for root, whole, own in zip(self.roots, self.matrices, left, strict=True):
            energy = (root @ whole).norm().clamp_min(1e-150)
            found.append(torch.linalg.svdvals(root @ own) / energy)
        return found


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A family after the decision: its PCA, a rank and factors for each layer, errors.

    ``factors``: (down (I, r), up (r, O)) or None; ``errors``: each layer's share of the energy of
    its outputs that is lost on the calibration.
    """

    family: Family
    pca: MatrixPCA
    ranks: list[int]
    factors: list[tuple[Tensor, Tensor] | None]
    errors: list[float]


def solve(
    families: Sequence[Family], budget: int, *, atoms: int, allocation: str
) -> list[Shared] | None:
    """Decide atoms and ranks of all families within a budget of numbers; None: it is too small.

    With ``atoms`` 0 every family takes the number that loses least of its outputs' energy when
    the rest of its share of the budget goes to ranks. Ranks are then dealt over all families.
    """
    share = budget / max(1, sum(f.numbers for f in families))
    chosen: list[MatrixPCA] = []
    for family in families:
        family.roots = [cholesky_root(m) for m in family.moments]
        chosen.append(_atoms(family, share, atoms, allocation))
    spent = sum(f.cost(len(p.atoms)) for f, p in zip(families, chosen, strict=True))
    if spent > budget:
        return None
    spectra = [f.spectra(p) for f, p in zip(families, chosen, strict=True)]
    ranks = _deal(families, spectra, budget - spent, allocation)
    return [
        _shared(family, pca, own, values)
        for family, pca, own, values in zip(families, chosen, ranks, spectra, strict=True)
    ]


def _atoms(family: Family, share: float, atoms: int, allocation: str) -> MatrixPCA:
    layers, budget = len(family.matrices), int(share * family.numbers)
    if atoms:
        return matrix_pca(family.matrices, min(atoms, layers - 1))
    best: tuple[float, MatrixPCA] | None = None
    for count in range(1, layers):
        pca = matrix_pca(family.matrices, count)
        if count > 1 and family.cost(count) > budget:
            break
        spectra = family.spectra(pca)
        left = max(0, budget - family.cost(count))
        (ranks,) = _deal([family], [spectra], left, allocation)
        lost = sum(float(v[r:].square().sum()) for v, r in zip(spectra, ranks, strict=True))
        if best is None or lost < best[0]:
            best = lost, pca
    assert best is not None
    return best[1]


def _deal(
    families: Sequence[Family], spectra: Sequence[list[Tensor]], budget: int, allocation: str
) -> list[list[int]]:
    flat = [values for own in spectra for values in own]
    costs = [f.rank_cost for f, own in zip(families, spectra, strict=True) for _ in own]
    ranks = iter(allocate_ranks(flat, costs, budget, allocation=allocation))  # type: ignore[arg-type]
    return [[next(ranks) for _ in own] for own in spectra]


def _shared(family: Family, pca: MatrixPCA, ranks: list[int], spectra: Sequence[Tensor]) -> Shared:
    left = family.matrices - pca.reconstruction()
    factors: list[tuple[Tensor, Tensor] | None] = []
    errors: list[float] = []
    for layer, rank in enumerate(ranks):
        factors.append(None)
        if rank:
            found = low_rank_refinement(left[layer], family.moments[layer], rank=rank)
            factors[-1] = found.down, found.up
        errors.append(float(spectra[layer][rank:].square().sum()))
    return Shared(family=family, pca=pca, ranks=ranks, factors=factors, errors=errors)


def fits(shared: Sequence[Shared]) -> Mapping[str, float]:
    """Return the mean share of output energy lost, by dictionary."""
    return {s.family.name: sum(s.errors) / len(s.errors) for s in shared}
