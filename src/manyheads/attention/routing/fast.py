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
from manyheads.attention.routing.tiles import Layout, attend_tiles

__all__ = ["attend_block", "attend_strict", "attend_top", "tile_sizes"]

_HIDDEN = -1e9
_Tables = tuple[Tensor | None, Tensor | None]


def tile_sizes(window: int) -> tuple[int, int]:
    """Return the queries of one tile of the strict form, and its keys, a multiple of them."""
    size = window if window <= 32 else -(-window // 2)
    return size, -(-(size + window - 1) // size) * size


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

    def select(x: Tensor) -> Tensor:  # (B, H, C, W)
        distances = routing_distances(x.detach(), means)
        return routing_select(distances, window, lengths=lengths, strided=strided)

    q_index = select(q)
    k_index = q_index if is_shared else select(k)
    size = q_index.shape[3]
    queries, keys = (index.flatten(2).flatten(0, 1) for index in (q_index, k_index))  # (G, C W)
    count = q.new_zeros(len(queries), q.shape[2])
    count = count.scatter_add(1, queries, q.new_ones(()).expand_as(queries))
    # Keys stand in the order of their places: what a query sees of them is at the front.
    high = torch.full((), size, device=q.device)
    if is_causal:
        if is_shared or official:
            high = torch.arange(1, size + 1, device=q.device)
        else:
            high = torch.searchsorted(k_index, q_index, right=True)
    if lengths is not None:
        real = (k_index < lengths[:, None, None, None]).sum(-1, keepdim=True)
        high = torch.minimum(high, real)
    high = high.expand_as(q_index).reshape(queries.shape)
    share = (1 / (count + eps)).gather(1, queries).masked_fill(high < 1, 0)
    high = high.clamp_min(1)
    layout = Layout(queries, keys, torch.zeros_like(high), high, share, None, None, None)
    if hidden is not None:
        hidden = hidden.gather(2, k_index.flatten(2))
        hidden = hidden.unflatten(2, k_index.shape[2:])[..., None, :].flatten(0, 1)
    return _attend(
        q, k, v, layout, tables,
        size=size, reach=size, shift=0, hidden=hidden, uniform=official, dropout_p=dropout_p,
    )  # fmt: skip


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
    eps: float,
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
        eps: outputs are divided by 1 + eps.
    """
    length, count = q.shape[2], k.shape[2]
    size, reach = tile_sizes(window)
    own, theirs = own.flatten(0, 1), theirs.flatten(0, 1)
    ids, order = theirs.sort(dim=-1, stable=True)  # (G, M)
    places = torch.arange(count, device=q.device)
    rank = torch.zeros_like(order).scatter(-1, order, places.expand_as(order))
    buckets = -(-count // size)
    if is_shared:
        stop = (places + 1).expand_as(order)
        start = torch.searchsorted(ids, ids)
        fill = (0, buckets * size - count)
        queries, start, stop = (F.pad(t, fill) for t in (order, start, stop))
        slot, block = rank, None
        first = torch.arange(buckets, device=q.device).expand(len(order), buckets)
    else:
        code = ids * (count + 1) + order
        stop = torch.searchsorted(code, own * (count + 1) + places[count - length :], right=True)
        start = torch.searchsorted(ids, own)
        slot, block = _tiles((stop - 1).clamp_min(0) // size, size, buckets)
        queries = torch.full((len(slot), block.shape[1] * size), length, device=q.device)
        queries = queries.scatter(-1, slot, torch.arange(length, device=q.device).expand_as(slot))
        empty, queries = queries >= length, queries.clamp_max(length - 1)
        start, stop = (t.gather(-1, queries).masked_fill(empty, 0) for t in (start, stop))
        first = block
    start = torch.maximum(start, stop - window)
    share = (stop > start).to(q) / (1 + eps)
    # Counted from the first key of the tile.
    base = (first * size - (reach - size)).repeat_interleave(size, -1)
    seen = stop > start
    low = torch.where(seen, start - base, 0)
    high = torch.where(seen, stop - base, 1)
    keys = F.pad(order, (reach - size, buckets * size - count))
    layout = Layout(queries, keys, low, high, share, slot, rank + (reach - size), block)
    distance = None
    if block is not None and any(t is not None for t in tables):
        # A query stands where its interval ends, which is not the place it has in the tile.
        columns = torch.arange(reach, device=q.device)
        distance = columns - (high - 1).unflatten(-1, (-1, size))[..., None]
    return _attend(
        q, k, v, layout, tables,
        size=size, reach=reach, shift=reach - size, distance=distance, dropout_p=dropout_p,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    tables: _Tables,
    *,
    size: int,
    reach: int,
    shift: int,
    distance: Tensor | None = None,
    hidden: Tensor | None = None,
    uniform: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend (B, H, N, D) as the layout says, by the operator or by what autograd keeps.

    ``shift``, ``distance``, ``uniform``: as :func:`attend_block`; ``hidden`` (G, T, 1, J).
    """
    heads, batch = q.shape[1], q.shape[0]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if distance is None and hidden is None and not uniform and not dropout_p:
        rows = (_rows(tables[0], q, size, reach, shift), _rows(tables[1], v, size, reach, shift))
        out = attend_tiles(q, k, v, layout, rows, size=size, reach=reach)
        return out.unflatten(0, (batch, heads))
    queries, keys, low, high, share, slot, _, block = layout
    low, high = (t.unflatten(-1, (-1, size))[..., None] for t in (low, high))
    tiles, columns = low.shape[1], torch.arange(reach, device=q.device)
    allowed = (columns >= low) & (columns < high)
    if hidden is not None:
        allowed = allowed & ~hidden
    if block is None:
        block = torch.arange(tiles, device=q.device).expand(len(keys), tiles)
    index = keys.gather(1, (block[..., None] * size + columns).flatten(1))
    made = attend_block(
        take_rows(q, queries).unflatten(1, (tiles, size)),
        take_rows(k, index).unflatten(1, (tiles, reach)),
        take_rows(v, index).unflatten(1, (tiles, reach)),
        allowed,
        tables,
        shift=shift,
        distance=distance,
        uniform=uniform,
        dropout_p=dropout_p,
    )
    made = made.flatten(1, 2) * share[..., None]
    if slot is not None:
        out = take_rows(made, slot)
    else:
        index = queries[..., None].expand_as(made)
        out = made.new_zeros(*q.shape[:2], v.shape[2]).scatter_add(1, index, made)
    return out.unflatten(0, (batch, heads))


def _rows(table: Tensor | None, x: Tensor, size: int, reach: int, shift: int) -> Tensor | None:
    return None if table is None else block_table(table.to(x), size, reach, shift)


def _tiles(bucket: Tensor, size: int, buckets: int) -> tuple[Tensor, Tensor]:
    """Deal queries into tiles of ``size``, each of one bucket.

    Returns:
        The place (G, N) of each query among all places of all tiles, and the bucket (G, T)
        of each tile. T does not depend on the data: every bucket may leave one tile unfilled.
    """
    length = bucket.shape[-1]
    tiles = buckets + length // size
    order = bucket.argsort(dim=-1, stable=True)
    numbers = torch.arange(buckets, device=bucket.device).expand(len(bucket), buckets)
    ordered = bucket.gather(-1, order)
    first = torch.searchsorted(ordered, numbers.contiguous())  # (G, buckets)
    last = torch.searchsorted(ordered, numbers.contiguous(), right=True)
    used = (last - first + size - 1) // size
    ends = used.cumsum(-1)
    rank = torch.arange(length, device=bucket.device) - first.gather(-1, ordered)
    place = (ends - used).gather(-1, ordered) * size + rank
    slot = torch.zeros_like(place).scatter(-1, order, place)
    tile = torch.arange(tiles, device=bucket.device).expand(len(bucket), tiles)
    owner = torch.searchsorted(ends, tile.contiguous(), right=True).clamp_max(buckets - 1)
    return slot, owner
