"""Truncated Newton-Raphson inverses of Gaussian Gram matrices.

M landmarks; matrices are (..., M, M), symmetric and not negative.

Both are approximate by design: on ill-conditioned matrices twenty steps do not converge, and the
models are trained with what comes out. An exact inverse gives other numbers there.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from manyheads.layers.precision import no_autocast, without_autocast

__all__ = ["newton_inverse", "newton_inverse_normalised"]

_SHIFT = 0.01
_STEP = 0.9 * 2
# The normalised form: the step is halved until the residual's norm falls below this bound.
_BOUND = 1.01
_HALVINGS = 10


def check_square(matrix: Tensor, iterations: int) -> None:
    if matrix.ndim < 3 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"matrices of shape {tuple(matrix.shape)} are not (..., M, M): give a batch of square "
            "Gram matrices, one alone as matrix[None]"
        )
    if iterations < 0:
        raise ValueError(f"iterations {iterations} is negative: give 0 or more Newton steps")


def _wide(x: Tensor) -> Tensor:
    """Row sums reach M and the step 1 / M²: half precision cannot hold the iteration."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _iterate(estimate: Tensor, matrix: Tensor, iterations: int) -> Tensor:
    shape = matrix.shape
    estimate, matrix = estimate.flatten(0, -3), matrix.flatten(0, -3)
    for _ in range(iterations):
        # 2 Y - (Y P) Y
        estimate = torch.baddbmm(estimate, torch.bmm(estimate, matrix), estimate, beta=2, alpha=-1)
    return estimate.view(shape)


@without_autocast
def _plain(matrix: Tensor, iterations: int) -> Tensor:
    step = _STEP / matrix.sum(-1).amax(-1).square()[..., None, None]
    shifted = matrix + _SHIFT * torch.eye(
        matrix.shape[-1], dtype=matrix.dtype, device=matrix.device
    )
    return _iterate(step * shifted, shifted, iterations)


class _ClosedForm(torch.autograd.Function):
    """The iteration forward; backward the derivative of an inverse, at the iterate returned."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, iterations: int) -> Tensor:
        return _plain(matrix, iterations)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        transposed = inverse.mT
        return -(transposed @ grads[0] @ transposed), None


def newton_inverse(matrix: Tensor, *, iterations: int = 20) -> Tensor:
    """Invert Gaussian Gram matrices approximately: Y <- 2 Y - Y P Y from Y = a P.

    P is the matrix plus 0.01 I, a = 1.8 / (largest row sum of the matrix)² of each matrix. For
    symmetric matrices without negative numbers it never diverges. The gradient is -Yᵀ G Yᵀ with
    the returned Y, whatever the number of steps: nothing of the iteration is kept, and nothing
    flows through the shift or the step. Where Y has not converged that is not the derivative of
    what was computed; the official models are trained with it.

    Args:
        matrix: (..., M, M). Half precision is computed and returned in float32.
        iterations: Newton steps; 40 M³ multiply-adds a matrix for the published 20.

    Raises:
        ValueError: the matrices are not square, or ``iterations`` is negative.

    Example:
        >>> gram = torch.exp(-torch.cdist(torch.eye(5)[None], torch.eye(5)[None]))
        >>> newton_inverse(gram).shape
        torch.Size([1, 5, 5])
    """
    check_square(matrix, iterations)
    matrix = _wide(matrix)
    if matrix.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _ClosedForm.apply(matrix, iterations))
    return _plain(matrix, iterations)


def newton_inverse_normalised(
    matrix: Tensor, *, iterations: int = 20, shared_step: bool = False
) -> Tensor:
    """Invert matrices approximately, without a shift, differentiable through every step.

    Y starts at a A with a = 2 / (largest row sum)², halved up to ten times until no column of
    I - A Y sums to more than 1.01 in absolute values. Memory grows with ``iterations``.

    Args:
        matrix: (..., M, M). Half precision is computed and returned in float32.
        iterations: Newton steps.
        shared_step: one step for the whole tensor as in the official code, by which a sample's
            result depends on the others in its batch where it has not converged; False: each
            matrix has a step of its own.

    Raises:
        ValueError: the matrices are not square, or ``iterations`` is negative.
    """
    check_square(matrix, iterations)
    matrix = _wide(matrix)
    with no_autocast(matrix.device):
        largest = matrix.sum(-1).amax(-1)  # (...)
        if shared_step:
            largest = largest.amax()
        step = 2 / largest.square()
        step = (step * _halving(matrix.detach(), step.detach()))[..., None, None]
        return _iterate(step * matrix, matrix, iterations)


def _halving(matrix: Tensor, step: Tensor) -> Tensor:
    """Return the power of 1/2 by which each step is shortened.

    The columns of I - a A² have the sums |1 - a d| + a (c - |d|), d the diagonal of A² and c its
    column sums: all eleven candidates are judged at once, without waiting for a device.
    """
    squared = matrix @ matrix
    diagonal = squared.diagonal(dim1=-2, dim2=-1)  # (..., M)
    others = squared.abs().sum(-2) - diagonal.abs()
    powers = 0.5 ** torch.arange(_HALVINGS + 1, dtype=matrix.dtype, device=matrix.device)
    tried = (step[..., None] * powers)[..., None]  # (..., 11, 1), or (11, 1) of a shared step
    sums = (1 - tried * diagonal[..., None, :]).abs() + tried * others[..., None, :]
    norms = sums.amax(-1)  # (..., 11)
    if step.ndim == 0:
        norms = norms.flatten(0, -2).amax(0)
    fits = norms <= _BOUND
    fits = torch.cat((fits[..., :-1], torch.ones_like(fits[..., -1:])), -1)  # the last one stays
    return powers[fits.to(torch.uint8).argmax(-1)]
