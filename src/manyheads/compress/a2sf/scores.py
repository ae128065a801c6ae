"""How much each cached key was attended to: weighted column sums of the attention matrix.

B batch, H query heads, G key-value heads, N new queries, M keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulate", "column_sums", "forgetting_weights"]

_BLOCK = 128
_ELEMENTS = 1 << 22  # of one block of attention rows


def forgetting_weights(real: Tensor, alpha: float) -> Tensor:
    """Return alpha to the power of the number of later real queries; 0 at padding.

    Args:
        real: (B, N), True = a real token.
        alpha: 1 weighs all queries alike, 0 the last one alone.

    Returns:
        (B, N) in float32.

    Example:
        >>> forgetting_weights(torch.ones(1, 3, dtype=torch.bool), 0.5).tolist()
        [[0.25, 0.5, 1.0]]
    """
    later = real.flip(-1).cumsum(-1).flip(-1) - real.long()
    return alpha ** later.float() * real


def accumulate(rows: Tensor, weights: Tensor, groups: int) -> Tensor:
    """Return the weighted column sums of attention rows, summed over the heads of a group.

    Args:
        rows: (B, H, N, M), rows of the attention matrix.
        weights: (B, N).
        groups: G, which divides H.

    Returns:
        (B, G, M), in float32 at least.
    """
    batch, heads, queries, keys = rows.shape
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    folded = wide.reshape(batch, groups, heads // groups * queries, keys)
    return (_row_weights(weights, heads // groups).to(wide.dtype) @ folded).squeeze(2)


def column_sums(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the weighted column sums of softmax(query key'), a block of rows at a time.

    The matrix is never held as a whole. Queries without weight are not computed: with a
    forgetting factor below one all but the last few hundred have none in float32.

    Args:
        query: (B, H, N, D), the last N of M tokens unless ``mask`` says otherwise.
        key: (B, G, M, D).
        weights: (B, N), of the queries.
        mask: True where a query may attend, or a bias, broadcast to (B, H, N, M); None for
            causality alone.
        scale: factor on the scores; 1 / sqrt(D) by default.

    Returns:
        (B, G, M), in float32 at least.

    Raises:
        ValueError: more queries than keys without a mask, or heads that G does not divide.

    Example:
        >>> key = torch.zeros(1, 1, 3, 4)
        >>> column_sums(key, key, torch.ones(1, 3)).sum()
        tensor(3.)
    """
    batch, heads, queries, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    if heads % groups:
        raise ValueError(f"query has {heads} heads, which is no multiple of the key's {groups}")
    if mask is None and queries > keys:
        raise ValueError(f"query has {queries} tokens and key {keys}: keys hold the queries' own")
    share, past = heads // groups, keys - queries
    kind = torch.promote_types(query.dtype, torch.float32)
    scale = dim**-0.5 if scale is None else scale
    sums = torch.zeros(batch, groups, keys, dtype=kind, device=query.device)
    used = (weights != 0).any(0)
    first = int(used.int().argmax()) if bool(used.any()) else queries
    wide = key.to(kind)
    step = max(1, min(_BLOCK, _ELEMENTS // (batch * heads * keys)))
    for start in range(first, queries, step):
        stop = min(start + step, queries)
        seen = past + stop if mask is None else keys
        block = query[:, :, start:stop].to(kind) * scale
        folded = block.reshape(batch, groups, share * (stop - start), dim)
        scores = folded @ wide[:, :, :seen].transpose(2, 3)
        scores = scores.view(batch, heads, stop - start, seen)
        if mask is None:
            late = _later(start + past, stop + past, seen, query.device)
            scores.masked_fill_(late, torch.finfo(kind).min)
        else:
            scores = _masked(scores, mask[:, :, start:stop] if mask.shape[2] > 1 else mask)
        sums[:, :, :seen] += accumulate(scores.softmax(-1), weights[:, start:stop], groups)
    return sums


def _row_weights(weights: Tensor, share: int) -> Tensor:
    return weights[:, None, None].expand(-1, 1, share, -1).flatten(2)[:, :, None]


def _later(start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    places = torch.arange(keys, device=device)
    return places > torch.arange(start, stop, device=device)[:, None]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    lowest = torch.finfo(scores.dtype).min
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, lowest)
    return (scores + mask).clamp_min(lowest)
