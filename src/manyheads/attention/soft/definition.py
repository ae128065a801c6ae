"""Softmax-free attention by its definition.

B batch, H heads, N places, M landmarks, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.soft.newton import newton_inverse, newton_inverse_normalised

__all__ = ["check_soft", "gaussian_attention", "soft_reference"]


def check_soft(query: Tensor, landmarks: Tensor, value: Tensor) -> None:
    """Check what :func:`soft` takes.

    Raises:
        ValueError: an axis has a size that does not fit.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in (("query", query), ("landmarks", landmarks), ("value", value)):
        if x.ndim != 4:
            raise ValueError(f"{name} has {x.ndim} axes, expected (batch, heads, length, head_dim)")
    if landmarks.shape[:2] != query.shape[:2] or landmarks.shape[3] != query.shape[3]:
        raise ValueError(
            f"landmarks {tuple(landmarks.shape)} differ from query {tuple(query.shape)} in batch, "
            "heads or head_dim: only the length may differ"
        )
    if value.shape[:3] != query.shape[:3]:
        raise ValueError(
            f"value {tuple(value.shape)} and query {tuple(query.shape)} differ in batch, heads or "
            "length: keys are the queries, so values belong to them"
        )
    if not landmarks.shape[2]:
        raise ValueError(
            "landmarks have length 0: give at least 1, by a smaller ratio or more rows"
        )


def gaussian_attention(query: Tensor, value: Tensor, *, scale: float | None = None) -> Tensor:
    """Return exp(-scale |q_i - q_j|² / 2) V: what :func:`soft` approximates. O(N²).

    Args:
        query: (B, H, N, D); the keys are the queries.
        value: (B, H, N, V).
        scale: 1 / √D if None.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _gaussian(query, query, scale) @ value


def soft_reference(
    query: Tensor,
    landmarks: Tensor,
    value: Tensor,
    *,
    scale: float = 1.0,
    iterations: int = 20,
    normalise: bool = False,
    shared_step: bool = False,
) -> Tensor:
    """Compute K1 Y K1ᵀ V as it is written, with an N x N matrix: the oracle of the tests.

    Arguments as in :func:`soft`. Squared distances are sums of squared differences.
    """
    check_soft(query, landmarks, value)
    to_landmarks = _gaussian(query, landmarks, scale)  # (B, H, N, M)
    gram = _gaussian(landmarks, landmarks, scale)
    if normalise:
        inverse = newton_inverse_normalised(gram, iterations=iterations, shared_step=shared_step)
        root = gram.sum(-1).rsqrt()
        inverse = root[..., :, None] * inverse * root[..., None, :]
    else:
        inverse = newton_inverse(gram, iterations=iterations)
    return to_landmarks @ inverse @ to_landmarks.mT @ value


def _gaussian(a: Tensor, b: Tensor, scale: float) -> Tensor:
    distances = (a[..., :, None, :] - b[..., None, :, :]).square().sum(-1)
    return (-0.5 * scale * distances).exp()
