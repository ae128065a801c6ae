"""The grouped softmax as a matrix, for landmarks at any places.

B batch, H heads, N queries (the last N of M keys), M keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.landmark.definition import (
    BLOCK_SIZE,
    landmark_groups,
    regular_landmarks,
)
from manyheads.layers.heads import repeat_kv
from manyheads.layers.ragged import check_mask

__all__ = ["grouped_softmax", "landmark_weights"]


def grouped_softmax(
    scores: Tensor,
    is_landmark: Tensor,
    *,
    mask: Tensor | None = None,
    group_dropout: float = 0.0,
) -> Tensor:
    """Return the probabilities (B, H, N, M) of scores (B, H, N, M), causally.

    A query's own block competes with the landmarks of earlier blocks; each earlier block shares
    out the probability of its landmark among its tokens. Landmarks end with probability 0, and
    are ignored by queries of their own block, their own among them. Queries are the last N keys.

    Args:
        scores: (B, H, N, M); softmax is in float32 at least.
        is_landmark: (B, M) bool, at any places; what follows the last one is a block too.
        mask: (B, M), True = a real key. A query that sees no key gets zeros.
        group_dropout: probability with which an earlier block is left out for a query, drawn by
            torch's global generator; those that stay count the more, the own block as ever.

    Raises:
        ValueError: ``is_landmark`` or ``mask`` is not (batch, keys).

    Example:
        >>> marks = torch.tensor([[False, False, True, False]])
        >>> grouped_softmax(torch.zeros(1, 1, 4, 4), marks)[0, 0, 3]
        tensor([0.2500, 0.2500, 0.0000, 0.5000])
    """
    batch, _, queries, keys = scores.shape
    if is_landmark.shape != (batch, keys):
        raise ValueError(
            f"is_landmark has shape {tuple(is_landmark.shape)}, expected (batch, keys) = "
            f"({batch}, {keys})"
        )
    mask = check_mask(mask, batch, keys)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    block, own, gates, ordinary = landmark_groups(is_landmark, queries, mask)
    own, gates, ordinary = own[:, None], gates[:, None], ordinary[:, None]
    allowed = own | gates
    empty = ~allowed.any(-1, keepdim=True)
    top = wide.masked_fill(~(allowed | empty), -torch.inf).softmax(-1).masked_fill(~allowed, 0)
    # One softmax for each block, its maximum and sum gathered by the number of the block.
    place = block[:, None, None].expand_as(wide)
    shape = (*wide.shape[:3], keys)
    inside = wide.masked_fill(~ordinary, -torch.inf)
    highest = wide.detach().new_full(shape, -torch.inf)
    highest.scatter_reduce_(-1, place, inside.detach(), "amax")
    highest = highest.masked_fill(highest == -torch.inf, 0)
    parts = (inside - highest.gather(-1, place)).exp()
    sums = wide.new_zeros(shape).scatter_add(-1, place, parts)
    gate = wide.new_zeros(shape).scatter_add(-1, place, top.masked_fill(~gates, 0))
    if group_dropout:
        gate = torch.nn.functional.dropout(gate, group_dropout)
    shared = gate / sums.masked_fill(sums == 0, 1)
    return (top.masked_fill(~own, 0) + parts * shared.gather(-1, place)).to(scores.dtype)


def landmark_weights(
    query: Tensor,
    key: Tensor,
    *,
    is_landmark: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the attention matrix (B, H, N, M), O(N M): for looking, not for speed.

    Arguments as :func:`manyheads.attention.landmark`; ``mask`` (B, M) for N <= M.
    """
    batch, keys = key.shape[0], key.shape[2]
    mask = check_mask(mask, batch, keys)
    if is_landmark is None:
        is_landmark = regular_landmarks(keys, block_size, device=key.device).expand(batch, -1)
        if mask is not None:  # padding takes no place in a block
            is_landmark = mask & (mask.long().cumsum(1) % block_size == 0)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ repeat_kv(key, query.shape[1]).mT * scale
    weights = grouped_softmax(scores, is_landmark, mask=mask)
    return weights if mask is None else weights * mask[:, None, keys - query.shape[2] :, None]
