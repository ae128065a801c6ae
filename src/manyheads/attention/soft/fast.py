"""Softmax-free attention without anything of N x N.

B batch, H heads, N places, M landmarks, D head dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.soft.definition import check_soft
from manyheads.attention.soft.newton import newton_inverse, newton_inverse_normalised
from manyheads.layers.precision import no_autocast

__all__ = ["gaussian_kernel", "soft", "squared_distances"]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|² (..., N, M) of (..., N, D) and (..., M, D) by matrix products.

    |a|² + |b|² - 2 a·b may fall below 0 by rounding, and is left so, as in the official code.
    """
    return a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * (a @ b.mT)


def gaussian_kernel(a: Tensor, b: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return exp(-scale |a_i - b_j|² / 2) (..., N, M) of (..., N, D) and (..., M, D)."""
    if scale != 1.0:
        a, b = a * scale**0.5, b * scale**0.5
    # The halves of the squared lengths are subtracted from a·b: one pass less over N x M. Sums and
    # exponentials in place: on large maps fresh memory costs as much as what is written to it.
    shape = (*a.shape[:-1], b.shape[-2])
    own = -0.5 * a.square().sum(-1, keepdim=True)
    other = -0.5 * b.square().sum(-1)[..., None, :]
    a, b, own, other = (t.flatten(0, -3) for t in (a, b, own, other))
    return torch.baddbmm(other, a, b.mT).add_(own).exp_().view(shape)


def soft(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    iterations: int = 20,
    normalise: bool = False,
    shared_step: bool = False,
) -> Tensor:
    """Attend with a Gaussian kernel through landmarks; approximate, needs training, bidirectional.

    K1 (Y (K1ᵀ V)) with K1 = exp(-|q - l|² / 2) and Y a truncated inverse of the landmarks'
    own kernel matrix. Keys are the queries. O(N M (D + V) + M³): linear in N for a fixed number
    of landmarks.

    Args:
        query: (B, H, N, D), scaled already unless ``scale`` is given.
        landmarks: (B, H, M, D), on the scale of the queries.
        value: (B, H, N, V).
        scale: factor of squared distances.
        iterations: Newton steps of the inverse. They are a part of the model: more of them give
            other numbers.
        normalise: take D^-½ Y D^-½ with D the row sums, without a shift of the diagonal.
        shared_step: with ``normalise``, one step for the whole batch as in the official code.

    Returns:
        (B, H, N, V) in the dtype of ``value``; the kernel and the inverse are made in float32 at
        least.

    Raises:
        ValueError: sizes that do not fit, no landmarks, or negative ``iterations``.

    Example:
        >>> q, v = torch.randn(2, 1, 4, 196, 32) / 32**0.25
        >>> soft(q, q[:, :, ::4], v).shape
        torch.Size([1, 4, 196, 32])
    """
    check_soft(query, landmarks, value)
    dtype = value.dtype
    with no_autocast(query.device):
        query, landmarks, value = (
            t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
            for t in (query, landmarks, value)
        )
        to_landmarks = gaussian_kernel(query, landmarks, scale=scale)  # (B, H, N, M)
        gram = gaussian_kernel(landmarks, landmarks, scale=scale)
        read = to_landmarks.mT @ value  # (B, H, M, V)
        if normalise:
            inverse = newton_inverse_normalised(
                gram, iterations=iterations, shared_step=shared_step
            )
            root = gram.sum(-1, keepdim=True).rsqrt()
            read = root * (inverse @ (root * read))
        else:
            read = newton_inverse(gram, iterations=iterations) @ read
        return (to_landmarks @ read).to(dtype)
