"""Landmark attention by its definition: a softmax within groups, gated by landmarks.

B batch, H heads, N queries (the last N of M keys), M keys, D head dim, L block with its landmark.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = [
    "BLOCK_SIZE",
    "LandmarkGroups",
    "check_block_size",
    "check_group_dropout",
    "landmark_groups",
    "landmark_reference",
    "regular_landmarks",
]

BLOCK_SIZE = 51  # 50 tokens and their landmark, as in the published language models


class LandmarkGroups(NamedTuple):
    """Who competes with whom.

    ``block`` (B, M): landmarks strictly before each key, which is the number of its block.
    ``own`` (B, N, M): ordinary keys of the query's own block that it sees. ``gates`` (B, N, M):
    landmarks of earlier blocks. ``ordinary`` (B, N, M): ordinary keys of earlier blocks.
    """

    block: Tensor
    own: Tensor
    gates: Tensor
    ordinary: Tensor


def regular_landmarks(
    length: int, block_size: int, *, device: torch.device | None = None
) -> Tensor:
    """Return (N,), True where a landmark stands at the end of every block of ``block_size``."""
    return torch.arange(1, length + 1, device=device) % block_size == 0


def landmark_groups(
    is_landmark: Tensor, queries: int, mask: Tensor | None = None
) -> LandmarkGroups:
    """Return the groups that landmarks at any places make.

    Args:
        is_landmark: (B, M) bool.
        queries: N; they are the last N of the M keys.
        mask: (B, M), True = a real key; others belong to no group.
    """
    landmark = is_landmark.bool() if mask is None else is_landmark.bool() & mask
    block = landmark.long().cumsum(1) - landmark.long()
    keys = is_landmark.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=block.device).tril(keys - queries)
    if mask is not None:
        seen = seen & mask[:, None]
    same = block[:, keys - queries :, None] == block[:, None]  # (B, N, M)
    gate = landmark[:, None]
    return LandmarkGroups(block, seen & same & ~gate, seen & ~same & gate, seen & ~same & ~gate)


def landmark_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_landmark: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The grouped softmax times V, block after block through N x M: the oracle of the tests."""
    check_qkv(query, key, value)
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.bool, device=key.device)
    if is_landmark is None:
        # Padding takes no place in a block.
        is_landmark = mask & (mask.long().cumsum(1) % block_size == 0)
    scores = query @ repeat_kv(key, heads).mT * (dim**-0.5 if scale is None else scale)
    block, own, gates, ordinary = landmark_groups(is_landmark, queries, mask)
    top = _softmax(scores, (own | gates)[:, None])
    weights = top * own[:, None]
    for number in range(int(block.max()) + 1):
        inside = (block == number)[:, None]  # (B, 1, M)
        gate = (top * (inside & gates)[:, None]).sum(-1, keepdim=True)
        weights = weights + gate * _softmax(scores, (inside & ordinary)[:, None])
    weights = weights * mask[:, None, keys - queries :, None]
    return weights @ repeat_kv(value, heads)


def _softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Softmax over the allowed keys; a row without any is zero."""
    empty = ~allowed.any(-1, keepdim=True)
    return scores.masked_fill(~(allowed | empty), -torch.inf).softmax(-1).masked_fill(~allowed, 0)


def check_block_size(block_size: int) -> None:
    """Check that a block holds a token beside its landmark.

    Raises:
        ValueError: it does not.
    """
    if block_size < 2:
        raise ValueError(f"block_size {block_size} must be at least 2: a token and its landmark")


def check_group_dropout(group_dropout: float) -> None:
    """Check a rate.

    Raises:
        ValueError: it lies outside [0, 1).
    """
    if not 0 <= group_dropout < 1:
        raise ValueError(f"group_dropout {group_dropout} must lie in [0, 1)")
