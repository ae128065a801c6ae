"""Attention to key-value caches of different lengths by its definition.

B batch, H heads, H_kv key-value heads, L query tokens, N capacity of the caches, D head dim,
V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask

__all__ = ["check_lengths", "lean_reference", "lean_weights"]


def lean_weights(
    query: Tensor,
    key: Tensor,
    *,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention matrix (B, H, L, N), O(L N) in memory: for looking, not for speed.

    Arguments as :func:`manyheads.attention.lean`. A row without any key is all zero.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ repeat_kv(key, query.shape[1]).mT * scale
    places = torch.arange(key.shape[2], device=key.device)
    ends = key.new_full((key.shape[0],), key.shape[2], dtype=torch.long)
    if lengths is not None:
        ends = check_lengths(lengths, key.shape[0], key.shape[2])
    allowed = (places < ends[:, None])[:, None, None]
    if is_causal:
        rows = torch.arange(query.shape[2], device=key.device) - query.shape[2]
        allowed = allowed & (places <= (ends[:, None] + rows)[..., None])[:, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    allowed = allowed.expand_as(scores)
    empty = ~allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~(allowed | empty), -torch.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0)


def lean_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale · Q Kᵀ) V through the L x N matrix: the oracle of the tests."""
    check_qkv(query, key, value)
    mask = check_mask(mask, key.shape[0], key.shape[2])
    weights = lean_weights(query, key, lengths=lengths, is_causal=is_causal, scale=scale, mask=mask)
    return weights @ repeat_kv(value, query.shape[1])


def check_lengths(lengths: Tensor, batch: int, capacity: int) -> Tensor:
    """Return the lengths as whole numbers after checking that they are (B,) and fit.

    Raises:
        ValueError: another shape, not whole numbers, or a length outside 0 to ``capacity``.
    """
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape != (batch,):
        raise ValueError(
            f"lengths has dtype {lengths.dtype} and shape {tuple(lengths.shape)}, expected whole "
            f"numbers of shape (batch,) = ({batch},)"
        )
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > capacity):
        raise ValueError(
            f"lengths reach from {int(lengths.min())} to {int(lengths.max())}, outside of 0 to "
            f"the {capacity} places of the caches"
        )
    return lengths.long()
