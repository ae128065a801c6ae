"""The parts of the conversion, on matrices alone: PCA of matrices, refinement, drift, budgets.

L layers, S atoms, I inputs, O outputs, r rank; matrices are (I, O), y = x W, as in the paper.
All is computed in float64: the Gram matrix squares the condition of what it is made of.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from manyheads.errors import unknown_name

__all__ = [
    "MatrixPCA",
    "Refinement",
    "allocate_ranks",
    "kl_drift",
    "low_rank_refinement",
    "matrix_pca",
    "runs_of_layers",
]


class MatrixPCA(NamedTuple):
    """``atoms`` (S, I, O), orthonormal under tr(AᵀB); ``coefficients`` (L, S); all L
    ``singular_values``; ``error``, the sum of squares that the reconstruction leaves.
    """

    atoms: Tensor
    coefficients: Tensor
    singular_values: Tensor
    error: Tensor

    def reconstruction(self) -> Tensor:
        """Return Σ_s c_ls D_s, (L, I, O)."""
        return torch.einsum("ls,sio->lio", self.coefficients, self.atoms)


def matrix_pca(matrices: Tensor, num_atoms: int) -> MatrixPCA:
    """Return the S matrices whose span is nearest to L given ones (2508.04581). Lossy if S < L.

    They are the first left singular vectors of [vec(W_1) ... vec(W_L)], found through its
    L x L Gram matrix; no mean is subtracted. Their signs are free.

    Args:
        matrices: (L, I, O), of any floating dtype.
        num_atoms: S, from 1 to L.

    Raises:
        ValueError: ``num_atoms`` is out of range or ``matrices`` has not three axes.

    Example:
        >>> found = matrix_pca(torch.randn(6, 5, 4), 2)
        >>> bool(torch.isclose(found.error, found.singular_values[2:].square().sum()))
        True
    """
    if matrices.ndim != 3:
        raise ValueError(f"matrices have {matrices.ndim} axes, expected (layers, inputs, outputs)")
    flat = matrices.detach().double().flatten(1)  # (L, I O)
    if not 1 <= num_atoms <= min(flat.shape):
        raise ValueError(f"{num_atoms} atoms must lie between 1 and {min(flat.shape)}")
    vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(1)
    scaled = vectors.mT @ flat
    # Roots of eigenvalues lose half the digits of small singular values; these lengths do not.
    singular = scaled.norm(dim=1).sort(descending=True).values[: min(flat.shape)]
    # QR makes atoms orthonormal where the matrices span fewer than S directions, too.
    atoms = torch.linalg.qr(scaled[:num_atoms].mT).Q.mT
    coefficients = flat @ atoms.mT
    error = (flat - coefficients @ atoms).square().sum()
    return MatrixPCA(
        atoms.unflatten(1, matrices.shape[1:]).contiguous(), coefficients, singular, error
    )


class Refinement(NamedTuple):
    """``down`` (I, r) and ``up`` (r, O), whose product corrects a residual; all
    ``singular_values`` of the whitened residual; ``root`` (I, I), R with A = RᵀR.
    """

    down: Tensor
    up: Tensor
    singular_values: Tensor
    root: Tensor


def low_rank_refinement(
    residual: Tensor, moments: Tensor | None, *, rank: int, damping: float = 1e-6
) -> Refinement:
    """Return the rank-r correction that leaves least of ||X (dW - correction)||. Lossy.

    A truncated SVD of R dW, R from the Cholesky factorisation of the inputs' second moments.

    Args:
        residual: dW (I, O).
        moments: A = XᵀX / n (I, I) of the inputs; None: all directions count alike.
        rank: r, from 0 to min(I, O).
        damping: share of A's mean diagonal that is added where A is singular.

    Raises:
        ValueError: the rank is out of range, or ``moments`` do not fit or are not finite.

    Example:
        >>> x, residual = torch.randn(50, 7), torch.randn(7, 5)
        >>> found = low_rank_refinement(residual, x.mT @ x / 50, rank=2)
        >>> found.down.shape, found.up.shape
        (torch.Size([7, 2]), torch.Size([2, 5]))
    """
    inputs, outputs = residual.shape
    if not 0 <= rank <= min(inputs, outputs):
        raise ValueError(f"rank {rank} must lie between 0 and {min(inputs, outputs)}")
    wide = residual.detach().double()
    root = torch.eye(inputs, dtype=torch.float64, device=wide.device)
    if moments is not None:
        if moments.shape != (inputs, inputs) or not bool(torch.isfinite(moments).all()):
            raise ValueError(
                f"moments {tuple(moments.shape)} must be finite and ({inputs}, {inputs})"
            )
        root = cholesky_root(moments, damping=damping)
    u, values, vh = torch.linalg.svd(root @ wide, full_matrices=False)
    scaled = u[:, :rank] * values[:rank]
    down = torch.linalg.solve_triangular(root, scaled, upper=True)
    return Refinement(down, vh[:rank], values, root)


def cholesky_root(moments: Tensor, *, damping: float = 1e-6) -> Tensor:
    """Return the upper R with A = RᵀR; singular A is damped by a share of its mean diagonal."""
    wide = moments.detach().double()
    added = damping * wide.diagonal().mean().clamp_min(1e-300)
    lower, failed = torch.linalg.cholesky_ex(wide)
    while int(failed):
        wide = wide + added * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
        lower, failed = torch.linalg.cholesky_ex(wide)
        added = added * 10  # rounding can hide a first, small addition
    return lower.mT


def kl_drift(means: Tensor, output_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each block moves the mean hidden state's distribution over tokens.

    The paper leaves open what is averaged and which way KL goes; here hidden states are averaged
    over samples and tokens, there is no final norm, and d_l = KL(p_l || p_{l+1}).

    Args:
        means: (L, C), mean output of every block.
        output_weight: (V, C).

    Returns:
        log p (L, V), and d (L - 1).
    """
    log_probs = (means.double() @ output_weight.double().mT).log_softmax(-1)
    before, after = log_probs[:-1], log_probs[1:]
    return log_probs, (before.exp() * (before - after)).sum(-1)


def runs_of_layers(drift: Tensor | Sequence[float], count: int) -> list[list[int]]:
    """Cut layers into runs behind the ``count - 1`` largest drifts: least drift inside runs.

    Args:
        drift: d (L - 1), between consecutive layers.
        count: runs to cut into, from 1 to L.

    Raises:
        ValueError: more runs than layers, or none.

    Example:
        >>> runs_of_layers([0.1, 0.9, 0.2], 2)
        [[0, 1], [2, 3]]
    """
    values = [float(d) for d in drift]
    layers = len(values) + 1
    if not 1 <= count <= layers:
        raise ValueError(f"{count} groups of {layers} layers: give 1 to {layers}")
    cuts = sorted(range(len(values)), key=lambda i: (-values[i], i))[: count - 1]
    borders = [0, *sorted(i + 1 for i in cuts), layers]
    return [list(range(a, b)) for a, b in pairwise(borders)]


def allocate_ranks(
    singular_values: Sequence[Tensor],
    costs: Sequence[int],
    budget: int,
    *,
    allocation: Literal["greedy", "uniform"] = "greedy",
) -> list[int]:
    """Return a rank for every residual so that they cost no more than a budget together.

    Args:
        singular_values: of every whitened residual, falling.
        costs: numbers that one rank of it takes, I + O.
        budget: numbers in all.
        allocation: greedy takes the most energy per number next, over all residuals (the paper
            gives query and output more, and does not say how); uniform spends the same share of
            the budget on each matrix of the same size.

    Raises:
        ValueError: the budget is negative, or the allocation unknown.

    Example:
        >>> allocate_ranks([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 1.9])], [4, 4], 12)
        [1, 2]
    """
    if budget < 0:
        raise ValueError(f"budget {budget} must not be negative")
    if allocation == "uniform":
        share = budget / max(1, sum(costs))
        return [min(int(share), len(v)) for v in singular_values]
    if allocation != "greedy":
        raise unknown_name("allocation", allocation, ("greedy", "uniform"))
    ranks = [0] * len(costs)

    def entry(i: int) -> tuple[float, int]:
        return -(float(singular_values[i][ranks[i]]) ** 2) / costs[i], i

    queue = [entry(i) for i in range(len(costs)) if len(singular_values[i])]
    heapq.heapify(queue)
    while queue:
        _, i = heapq.heappop(queue)
        if costs[i] > budget:
            continue
        budget -= costs[i]
        ranks[i] += 1
        if ranks[i] < len(singular_values[i]):
            heapq.heappush(queue, entry(i))
    return ranks
