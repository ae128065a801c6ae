"""Routing attention on gathered blocks: matrix products of C · W² or N · W numbers, never N².

B batch, H heads, N queries, M keys, D head dim of queries and keys, V of values, C clusters,
W window, T tiles of I queries and J keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.routing.definition import routing_distances, routing_select, take_rows
from manyheads.attention.routing.relative import (
    block_table,
    gather_by_distance,
    skew,
    spread_by_distance,
    unskew,
)

__all__ = ["attend_block", "attend_strict", "attend_top", "tile_sizes"]

_HIDDEN = -1e9
_Tables = tuple[Tensor | None, Tensor | None]


def tile_sizes(window: int) -> int:
    """Return the queries of one tile of the strict form."""
    return window if window <= 32 else -(-window // 2)


def attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None,
    tables: _Tables,
    *,
    shift: int = 0,
    distance: Tensor | None = None,
    uniform: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Softmax attention of (..., I, D) to (..., J, D) with relative terms.

    Args:
        allowed: broadcast to (..., I, J), or None for all. Where a query has none, the output is
            0, or with ``uniform`` the mean of all values, as official code has it.
        tables: of keys and values, (2R + 1, D and V), or None.
        shift: rank of the first query less that of the first key.
        distance: key rank − query rank (..., I, J), where the ranks are not consecutive.
    """
    logits = q @ k.mT
    queries, keys = logits.shape[-2:]
    key_table, value_table = tables
    if key_table is not None:
        if distance is None:
            rows = block_table(key_table.to(q), queries, keys, shift)
            logits = logits + skew(q @ rows.mT, keys)
        else:
            logits = logits + gather_by_distance(q, key_table.to(q), distance)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, _HIDDEN)
    weights = logits.softmax(-1)
    if allowed is not None and not uniform:
        weights = weights.masked_fill(~allowed, 0)
    if dropout_p:
        weights = F.dropout(weights, dropout_p)
    out = weights @ v
    if value_table is not None:
        if distance is None:
            out = out + unskew(weights) @ block_table(value_table.to(v), queries, keys, shift)
        else:
            out = out + spread_by_distance(weights, value_table.to(v), distance)
    return out


def attend_top(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    *,
    window: int,
    is_causal: bool,
    is_shared: bool,
    official: bool,
    strided: bool,
    tables: _Tables,
    lengths: Tensor | None,
    hidden: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """Centroids choose their W tokens; outputs of tokens chosen more than once are averaged.

    Args:
        lengths: (B,) tokens that may be chosen, at the front of each row, or None for all.
        hidden: (B, H, N) keys that are chosen and count, but are not attended to.
    """
    batch, heads, length, _ = q.shape

    def select(x: Tensor) -> Tensor:  # (B, H, C, W)
        distances = routing_distances(x, means)
        return routing_select(distances, window, lengths=lengths, strided=strided)

    q_index = select(q)
    k_index = q_index if is_shared else select(k)
    sizes = q_index.shape[2:]

    def gather(x: Tensor, index: Tensor) -> Tensor:
        return take_rows(x, index.flatten(2)).unflatten(2, sizes)

    allowed = None
    if is_causal:
        if official or is_shared:
            allowed = torch.ones(sizes[1], sizes[1], dtype=torch.bool, device=q.device).tril()
        else:
            allowed = k_index[..., None, :] <= q_index[..., None]
    if lengths is not None:
        seen = (k_index < lengths[:, None, None, None])[..., None, :]
        allowed = seen if allowed is None else allowed & seen
    if hidden is not None:
        seen = ~hidden.gather(2, k_index.flatten(2)).unflatten(2, sizes)[..., None, :]
        allowed = seen if allowed is None else allowed & seen
    out = attend_block(
        gather(q, q_index),
        gather(k, k_index),
        gather(v, k_index),
        allowed,
        tables,
        uniform=official,
        dropout_p=dropout_p,
    ).flatten(2, 3)  # (B, H, C W, V)
    base = torch.arange(batch * heads, device=q.device).view(batch, heads, 1) * length
    flat = (q_index.flatten(2) + base).flatten()
    total = out.new_zeros(batch * heads * length, v.shape[3])
    total = total.index_add(0, flat, out.reshape(-1, v.shape[3]))
    count = out.new_zeros(batch * heads * length).index_add(0, flat, torch.ones_like(flat).to(out))
    return (total / (count + eps)[:, None]).view(batch, heads, length, v.shape[3])


def attend_strict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: Tensor,
    theirs: Tensor,
    *,
    window: int,
    is_shared: bool,
    tables: _Tables,
    dropout_p: float,
) -> Tensor:
    """Attend to the last W keys of the own cluster, among those up to the own place.

    Keys are sorted by cluster and place; then each query sees an interval of them. Queries whose
    intervals end close to each other form a tile.

    Args:
        q: (B, H, N, D); k, v: (B, H, M, D and V), the last N of them at the queries' places.
        own, theirs: clusters of queries (B, H, N) and keys (B, H, M); clusters that only the one
            side has are seen by nobody.
        is_shared: queries and keys have the same clusters, and N = M.
    """
    length, count = q.shape[2], k.shape[2]
    size = tile_sizes(window)
    order = theirs.argsort(dim=-1, stable=True)  # (B, H, M)
    places = torch.arange(count, device=q.device)
    code = (theirs * (count + 1) + places).gather(-1, order)
    moment = places[count - length :].expand_as(own)
    stop = torch.searchsorted(code, own * (count + 1) + moment, right=True)  # (B, H, N)
    start = torch.searchsorted(code, own * (count + 1))
    start = torch.maximum(start, stop - window)
    buckets = -(-count // size)
    if is_shared:
        slot = torch.zeros_like(order).scatter(-1, order, places.expand_as(order))
        bucket = torch.arange(buckets, device=q.device).expand(*order.shape[:2], buckets)
    else:
        slot, bucket = _tiles((stop - 1).clamp_min(0) // size, size, buckets)
    tiles = bucket.shape[-1]
    source = torch.full((*slot.shape[:2], tiles * size), length, device=q.device)
    source = source.scatter(-1, slot, torch.arange(length, device=q.device).expand_as(slot))
    empty, source = source >= length, source.clamp_max(length - 1)
    low = start.gather(-1, source).masked_fill(empty, count).unflatten(-1, (tiles, size))
    high = stop.gather(-1, source).unflatten(-1, (tiles, size))
    reach = size + window - 1
    seen = bucket[..., None] * size + torch.arange(1 - window, size, device=q.device)
    index = order.gather(-1, seen.clamp(0, count - 1).flatten(2))  # (B, H, T J)
    seen = seen[..., None, :]  # (B, H, T, 1, J)
    allowed = (seen >= low[..., None]) & (seen < high[..., None])
    has_tables = any(t is not None for t in tables)
    distance = seen - (high[..., None] - 1) if has_tables and not is_shared else None
    out = attend_block(
        take_rows(q, source).unflatten(2, (tiles, size)),
        take_rows(k, index).unflatten(2, (tiles, reach)),
        take_rows(v, index).unflatten(2, (tiles, reach)),
        allowed,
        tables,
        shift=window - 1,
        distance=distance,
        dropout_p=dropout_p,
    )
    return take_rows(out.flatten(2, 3), slot)


def _tiles(bucket: Tensor, size: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Deal queries into tiles of ``size``, each of one bucket.

    Returns:
        The place (B, H, N) of each query among all places of all tiles, and the bucket (B, H, T)
        of each tile. T does not depend on the data: every bucket may leave one tile unfilled.
    """
    length = bucket.shape[-1]
    tiles = buckets + length // size
    order = bucket.argsort(dim=-1, stable=True)
    numbers = torch.arange(buckets, device=bucket.device).expand(*bucket.shape[:2], buckets)
    ordered = bucket.gather(-1, order)
    first = torch.searchsorted(ordered, numbers.contiguous())  # (B, H, buckets)
    last = torch.searchsorted(ordered, numbers.contiguous(), right=True)
    used = (last - first + size - 1) // size
    ends = used.cumsum(-1)
    rank = torch.arange(length, device=bucket.device) - first.gather(-1, ordered)
    place = (ends - used).gather(-1, ordered) * size + rank
    slot = torch.zeros_like(place).scatter(-1, order, place)
    tile = torch.arange(tiles, device=bucket.device).expand(*bucket.shape[:2], tiles)
    owner = torch.searchsorted(ends, tile.contiguous(), right=True).clamp_max(buckets - 1)
    return slot, owner
