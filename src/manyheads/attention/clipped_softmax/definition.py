"""Clipped softmax attention by its definition. B batch, H heads, N queries, M keys, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.softmax.definition import softmax_weights
from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = [
    "check_stretch",
    "clip_softmax",
    "clipped_softmax_reference",
    "clipped_softmax_weights",
    "stretch",
]


def check_stretch(gamma: float, eta: float) -> None:
    """Check the ends of the stretched interval.

    Raises:
        ValueError: gamma above 0, or eta below 1.
    """
    if gamma > 0:
        raise ValueError(f"gamma {gamma} must be at most 0 (0: no entry is clipped to 0)")
    if eta < 1:
        raise ValueError(f"eta {eta} must be at least 1 (1: no entry is clipped to 1)")


def stretch(probabilities: Tensor, *, gamma: float, eta: float) -> Tensor:
    """Return clip((eta − gamma) · p + gamma, 0, 1); what is clipped gets no gradient."""
    return ((eta - gamma) * probabilities + gamma).clamp(0, 1)


def clip_softmax(
    scores: Tensor, *, gamma: float = -0.03, eta: float = 1.0, dim: int = -1
) -> Tensor:
    """clip((eta − gamma) · softmax(x) + gamma, 0, 1): a softmax that reaches 0 and 1 exactly.

    Not a distribution: entries along ``dim`` need not sum to 1. An entry whose softmax is below
    −gamma / (eta − gamma) becomes exactly 0 and gets no gradient. Bondarenko et al., 2306.12929.
    Half precision is computed in float32.

    Args:
        scores: of any shape, masks added already.
        gamma: at most 0; −12 / length is usual.
        eta: at least 1.
        dim: the axis of keys.

    Raises:
        ValueError: gamma or eta is on the wrong side.

    Example:
        >>> clip_softmax(torch.tensor([4.0, 0.0, 0.0]), gamma=-0.1, eta=1.1)
        tensor([1., 0., 0.])
    """
    check_stretch(gamma, eta)
    work = torch.promote_types(scores.dtype, torch.float32)
    return stretch(scores.softmax(dim, dtype=work), gamma=gamma, eta=eta).to(scores.dtype)


def clipped_softmax_weights(
    query: Tensor,
    key: Tensor,
    *,
    gamma: float = -0.03,
    eta: float = 1.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the clipped attention matrix (B, H, N, M), O(N M) in memory: for looking.

    Arguments as :func:`~manyheads.attention.clipped_softmax`. Rows do not sum to 1.
    """
    check_stretch(gamma, eta)
    weights = softmax_weights(
        query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, mask=mask
    )
    return stretch(weights, gamma=gamma, eta=eta)


def clipped_softmax_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float = -0.03,
    eta: float = 1.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """clip((eta − gamma) softmax(scale · Q Kᵀ + bias) + gamma, 0, 1) V: the oracle of the tests."""
    check_qkv(query, key, value, same_length=is_causal)
    weights = clipped_softmax_weights(
        query, key, gamma=gamma, eta=eta, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        mask=mask,
    )  # fmt: skip
    out = weights @ repeat_kv(value, query.shape[1])
    if mask is not None and is_causal:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out
