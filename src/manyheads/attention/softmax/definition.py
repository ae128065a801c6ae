"""Softmax attention by its definition. B batch, H heads, N queries, M keys, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = ["softmax_reference", "softmax_weights"]


def softmax_weights(
    query: Tensor,
    key: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention matrix (B, H, N, M), O(N M) in memory: for looking, not for speed.

    Arguments as :func:`softmax_reference`. A row without any key is all zero.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ repeat_kv(key, query.shape[1]).mT * scale
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        else:
            scores = scores + attn_mask
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | empty), -torch.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0)


def softmax_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · Q Kᵀ + bias) V through the N x M matrix: the oracle of the tests."""
    check_qkv(query, key, value, same_length=is_causal)
    weights = softmax_weights(
        query, key, attn_mask=attn_mask, is_causal=is_causal, scale=scale, mask=mask
    )
    return weights @ repeat_kv(value, query.shape[1])
