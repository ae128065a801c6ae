"""Atoms and the coefficients that mix them. S atoms, L layers, I inputs, O outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from manyheads.layers.sharing.op import Pair, mix

__all__ = ["AtomDictionary", "CoefficientNetwork"]


class CoefficientNetwork(nn.Module):
    """Coefficients of L layers by a three-layer MLP on one learned vector a layer. Training only.

    The paper leaves sizes open; here they are ``dim`` throughout, with GELU. The last matrix is
    scaled so that the table starts with a mean square of 1/S, as direct coefficients do.
    """

    def __init__(self, num_layers: int, num_atoms: int, *, dim: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_layers, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Linear(dim, num_atoms),
        )
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.bias)
        with torch.no_grad():
            table = torch.stack([self(i) for i in range(num_layers)])
            last.weight.div_(table.square().mean().mul(num_atoms).sqrt().clamp_min(1e-12))

    def forward(self, layer: int) -> Tensor:
        """Return the coefficients (S) of one layer."""
        return self.mlp(self.embed.weight[layer])


class AtomDictionary(nn.Module):
    """S matrices that L layers mix theirs from. Holds them once; see :class:`SharedLinear`.

    Args:
        atoms: (S, O, I), laid out as the weight of ``nn.Linear``; becomes a parameter.
        coefficients: (L, S), which becomes a parameter, or a network that makes it.
        trained: False keeps the coefficients fixed (a buffer): one-hot ones are layers that share
            whole matrices.

    Raises:
        ValueError: atoms and coefficients that do not fit.
    """

    coefficients: Tensor

    def __init__(
        self, atoms: Tensor, coefficients: Tensor | CoefficientNetwork, *, trained: bool = True
    ) -> None:
        super().__init__()
        if atoms.ndim != 3 or 0 in atoms.shape:
            raise ValueError(
                f"atoms have shape {tuple(atoms.shape)}, expected (atoms, outputs, inputs)"
            )
        self.atoms = nn.Parameter(atoms.detach().clone())
        self.network: CoefficientNetwork | None = None
        if isinstance(coefficients, CoefficientNetwork):
            self.num_layers = coefficients.embed.num_embeddings
            width = coefficients(0).shape[0]
            self.network = coefficients
        else:
            self.num_layers, width = coefficients.shape
            values = coefficients.detach().clone().to(atoms)
            if trained:
                self.coefficients = nn.Parameter(values)
            else:
                self.register_buffer("coefficients", values)
        if width != len(atoms):
            raise ValueError(f"{width} coefficients a layer for {len(atoms)} atoms: give as many")

    def row(self, layer: int) -> Tensor:
        """Return the coefficients (S) of a layer."""
        return self.coefficients[layer] if self.network is None else self.network(layer)

    def pair(self, layer: int) -> Pair:
        """Return the atoms (S, O, I) and a layer's coefficients (S)."""
        return self.atoms, self.row(layer)

    def weight(self, layer: int) -> Tensor:
        """Return the mixed matrix (O, I) of a layer."""
        return mix(*self.pair(layer))

    @torch.no_grad()
    def store_coefficients(self) -> None:
        """Put the table that the network makes in its place; the outputs stay the same bits."""
        if self.network is not None:
            # Row by row, as in training: one product over all rows would round otherwise.
            table = torch.stack([self.row(i) for i in range(self.num_layers)])
            self.network = None
            self.coefficients = nn.Parameter(table)

    def sources(self) -> Sequence[Tensor]:
        """Return all tensors that mixed matrices depend on."""
        if self.network is None:
            return self.atoms, self.coefficients
        return self.atoms, *self.network.parameters()

    def extra_repr(self) -> str:
        count, outputs, inputs = self.atoms.shape
        return f"atoms={count}, layers={self.num_layers}, outputs={outputs}, inputs={inputs}"
