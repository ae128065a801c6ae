"""Attention of tiles of queries to intervals of sorted keys: one operator, head by head.

G batch times heads, N queries, M keys, D head dim of queries and keys, V of values, T tiles of I
queries and J keys, J a multiple of I.

A head's tokens are brought into the order of their tiles, and a tile's keys are a stretch of the
sorted ones: neighbouring tiles share keys through views. Scores stay in the processor's cache and
are made again in backward, so that nothing but inputs is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.attention.routing.relative import skew, unskew
from manyheads.layers.precision import without_autocast

__all__ = ["Layout", "attend_tiles"]

_SCORES = 1 << 17  # scores made at once: 512 KiB in float32


class Layout(NamedTuple):
    """Who meets whom.

    ``queries`` (G, T I): the query at each place of the tiles; ``keys`` (G, S): the keys in order,
    the first J − I of them before the first tile's. ``low`` and ``high`` (G, T I): the interval
    [low, high) that a place sees of its tile's J keys, never empty. ``share`` (G, T I): factor on
    what a place gives to its query, 0 where it does not count. ``query_place`` (G, N) and
    ``key_place`` (G, M): the one place of each, where all others hold none that counts; else None.
    ``block`` (G, T): tile t's last I keys are block ``block[t]`` of the sorted ones; None: block t.
    """

    queries: Tensor
    keys: Tensor
    low: Tensor
    high: Tensor
    share: Tensor
    query_place: Tensor | None
    key_place: Tensor | None
    block: Tensor | None


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    tables: tuple[Tensor | None, Tensor | None],
    *,
    size: int,
    reach: int,
) -> Tensor:
    """Return (G, N, V) for q (G, N, D), k (G, M, D) and v (G, M, V), float32 or float64.

    Args:
        tables: by distance, (I + J, D and V), as :func:`block_table` makes them.
        size, reach: I and J.
    """
    return _forward_op(q, k, v, *layout, *tables, size, reach)


@torch.library.custom_op("manyheads::routing_tiles", mutates_args=())
@without_autocast
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    low: Tensor,
    high: Tensor,
    share: Tensor,
    query_place: Tensor | None,
    key_place: Tensor | None,
    block: Tensor | None,
    key_rows: Tensor | None,
    value_rows: Tensor | None,
    size: int,
    reach: int,
) -> Tensor:
    out = q.new_empty(*q.shape[:2], v.shape[2])
    tiles = queries.shape[1] // size
    step = max(1, _SCORES // (size * reach))
    made = q.new_empty(tiles, size, v.shape[2])
    for g in range(q.shape[0]):
        tq = q[g].index_select(0, queries[g]).view(tiles, size, -1)
        tk, tv = (t[g].index_select(0, keys[g]) for t in (k, v))
        hidden = _Hidden(low[g], high[g], tiles, reach)
        for a in range(0, tiles, step):
            part = slice(a, min(a + step, tiles))
            kk, vv = (_stretch(t, part, _blocks(block, g), size, reach) for t in (tk, tv))
            weights = _weights(tq[part], kk, hidden(part), key_rows)
            torch.bmm(weights, vv, out=made[part])
            if value_rows is not None:
                made[part] += unskew(weights) @ value_rows
        made *= share[g].view(tiles, size, 1)
        _gathered(made.flatten(0, 1), _row(query_place, g), queries[g], out[g])
    return out


@_forward_op.register_fake
def _(q, k, v, *_):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:2], v.shape[2])


@torch.library.custom_op("manyheads::routing_tiles_backward", mutates_args=())
@without_autocast
def _backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    low: Tensor,
    high: Tensor,
    share: Tensor,
    query_place: Tensor | None,
    key_place: Tensor | None,
    block: Tensor | None,
    key_rows: Tensor | None,
    value_rows: Tensor | None,
    size: int,
    reach: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dkey_rows, dvalue_rows = (
        q.new_zeros(0) if t is None else torch.zeros_like(t) for t in (key_rows, value_rows)
    )
    tiles, blocks = queries.shape[1] // size, reach // size
    step = max(1, _SCORES // (size * reach))
    dtq = q.new_empty(tiles, size, q.shape[2])
    for g in range(q.shape[0]):
        tq = q[g].index_select(0, queries[g]).view(tiles, size, -1)
        tk, tv = (t[g].index_select(0, keys[g]) for t in (k, v))
        tg = grad[g].index_select(0, queries[g]).mul_(share[g, :, None]).view(tiles, size, -1)
        dtk, dtv = torch.zeros_like(tk), torch.zeros_like(tv)
        hidden = _Hidden(low[g], high[g], tiles, reach)
        for a in range(0, tiles, step):
            part = slice(a, min(a + step, tiles))
            own = _blocks(block, g)
            qq, gg = tq[part], tg[part]
            kk, vv = (_stretch(t, part, own, size, reach) for t in (tk, tv))
            weights = _weights(qq, kk, hidden(part), key_rows)
            _spread(dtv, weights.mT @ gg, part, own, size, blocks)
            slope = gg @ vv.mT
            if value_rows is not None:
                slope += skew(gg @ value_rows.mT, reach)
                dvalue_rows += torch.einsum("tij,tiv->jv", unskew(weights), gg)
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            torch.bmm(slope, kk, out=dtq[part])
            _spread(dtk, slope.mT @ qq, part, own, size, blocks)
            if key_rows is not None:
                turned = unskew(slope)
                dtq[part] += turned @ key_rows
                dkey_rows += torch.einsum("tij,tid->jd", turned, qq)
        _gathered(dtq.flatten(0, 1), _row(query_place, g), queries[g], dq[g])
        for made, whole in ((dtk, dk), (dtv, dv)):
            _gathered(made, _row(key_place, g), keys[g], whole[g])
    return dq, dk, dv, dkey_rows, dvalue_rows


@_backward_op.register_fake
def _(grad, q, k, v, *rest):  # type: ignore[no-untyped-def]
    rows = (q.new_zeros(0) if t is None else t.new_empty(t.shape) for t in rest[8:10])
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *rows)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.size, ctx.reach = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    *grads, key_rows, value_rows = _backward_op(grad, *tensors, ctx.size, ctx.reach)
    key_rows, value_rows = (
        None if t is None else d for t, d in zip(tensors[-2:], (key_rows, value_rows), strict=True)
    )
    return *grads, *(None,) * 8, key_rows, value_rows, None, None


_forward_op.register_autograd(_backward, setup_context=_context)


class _Hidden:
    """Makes the masks (t, I, J) of tiles, True where a key lies outside of the interval."""

    def __init__(self, low: Tensor, high: Tensor, tiles: int, reach: int) -> None:
        small = torch.int16 if reach < 1 << 15 else torch.int32
        self.low, self.high = (t.to(small).view(tiles, -1, 1) for t in (low, high))
        self.columns = torch.arange(reach, dtype=small, device=low.device)

    def __call__(self, part: slice) -> Tensor:
        return (self.columns < self.low[part]).logical_or_(self.columns >= self.high[part])


def _weights(q: Tensor, k: Tensor, hidden: Tensor, key_rows: Tensor | None) -> Tensor:
    scores = q @ k.mT
    if key_rows is not None:
        scores += skew(q @ key_rows.mT, k.shape[1])
    return torch.softmax(scores.masked_fill_(hidden, -torch.inf), -1)


def _row(index: Tensor | None, g: int) -> Tensor | None:
    return None if index is None else index[g]


_blocks = _row


def _stretch(x: Tensor, part: slice, block: Tensor | None, size: int, reach: int) -> Tensor:
    """Return the rows (t, J, D) of some tiles out of the sorted ones (S, D)."""
    rows = x[part.start * size :]
    if block is not None:
        first = block[part, None] + torch.arange(reach // size, device=x.device)
        chosen = x.view(-1, size * x.shape[1]).index_select(0, first.flatten())
        return chosen.view(-1, reach, x.shape[1])
    shape = (part.stop - part.start, reach, x.shape[1])
    return rows.as_strided(shape, (size * x.shape[1], x.shape[1], 1))


def _spread(
    total: Tensor, made: Tensor, part: slice, block: Tensor | None, size: int, blocks: int
) -> None:
    """Add the rows (t, J, D) of some tiles to the sorted ones (S, D)."""
    made = made.unflatten(1, (blocks, size))
    whole = total.view(-1, size, total.shape[1])
    for s in range(blocks):
        if block is None:
            whole[part.start + s : part.stop + s] += made[:, s]
        else:
            whole.index_add_(0, block[part] + s, made[:, s])


def _gathered(made: Tensor, place: Tensor | None, index: Tensor, out: Tensor) -> None:
    """Bring rows from their places into the order of tokens; without places, sum them."""
    if place is None:
        out.zero_().index_add_(0, index, made)
    else:
        torch.index_select(made, 0, place, out=out)
