"""Who meets whom in routing layers, as block masks: local heads, and tokens sorted by cluster.

B batch, H heads, N length, D head dim, C clusters, W window, I tokens a block, F flange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse import BlockMask, create_block_mask
from manyheads.attention.block_sparse.visits import Visits
from manyheads.attention.routing.definition import routing_distances, routing_normalize
from manyheads.layers.blocks import block_count

__all__ = ["SortedRouting", "local_block_mask", "local_visits", "routing_block_mask"]


class SortedRouting(NamedTuple):
    """``block_mask`` over queries and keys in the ``query_order`` and ``key_order`` (B, H, N)."""

    block_mask: BlockMask
    query_order: Tensor
    key_order: Tensor


def local_block_mask(
    length: int,
    *,
    block: int,
    flange: int,
    is_causal: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Return what :func:`blocked_local` attends to, for ``block_sparse``: the same output.

    Made in O(N): all blocks of queries see the same pattern.

    Args:
        length: N.
        block, flange: I, and F tokens before a block (and behind it, where not causal).
        is_causal: whether later keys are hidden.

    Raises:
        ValueError: a block below 1 or a negative number.

    Example:
        >>> print(local_block_mask(400, block=100, flange=100, is_causal=True))
        ▒···
        █▒··
        ·█▒·
        ··█▒
    """
    for name, value, least in (("length", length, 0), ("block", block, 1), ("flange", flange, 0)):
        if value < least:
            raise ValueError(f"{name} {value} must be at least {least}")
    table = local_visits(length, block=block, flange=flange, is_causal=is_causal, device=device)
    rows = block_count(length, block)
    there = table.columns < rows
    counts = there.view(rows, -1).sum(1)
    assert table.which is not None
    visits = table._replace(
        offsets=F.pad(counts.cumsum(0), (1, 0)),
        columns=table.columns[there],
        which=table.which[there],
    )
    return BlockMask(visits=visits, queries=length, keys=length, block_size=(block, block))


def local_visits(
    length: int, *, block: int, flange: int, is_causal: bool, device: torch.device | str
) -> Visits:
    """Return the same lists, all of one length: blocks outside the sequence have no tokens.

    Sizes depend on no tensor, so that a compiled graph can hold it.
    """
    rows, reach = block_count(length, block), block_count(flange, block)
    steps = range(-reach, 1 if is_causal else reach + 1)
    within = torch.arange(block, device=device)
    kinds: list[int] = []
    bits: list[Tensor] = []
    for step in steps:
        first, last = step * block, step * block + block - 1
        if first >= -flange and (last <= 0 if is_causal else last < block + flange):
            kinds.append(-1)
            continue
        kinds.append(len(bits))
        keys = first + within
        high = within[:, None] + 1 if is_causal else block + flange
        bits.append(((keys >= -flange) & (keys < high)).expand(block, block))
    columns = torch.arange(rows, device=device)[:, None] + torch.tensor(list(steps), device=device)
    columns = columns.masked_fill((columns < 0) | (columns >= rows), rows)
    return Visits(
        torch.arange(rows + 1, device=device) * len(steps),
        columns.flatten(),
        1,
        1,
        torch.tensor(kinds, device=device).repeat(rows),
        torch.stack(bits) if bits else None,
    )


@torch.no_grad()
def routing_block_mask(
    query: Tensor, key: Tensor, means: Tensor, *, window: int = 64, block_size: int = 64
) -> SortedRouting:
    """Return what strict routing attends to, with tokens sorted by cluster and place.

    ``block_sparse`` over the normalised queries and keys and the values in these orders, with
    ``scale=1``, gives (1 + eps) times what ``routing(..., is_causal=True)`` gives, in the order of
    the queries. For looking: all pairs are asked for, O(B H N²), though none is kept.

    Args:
        query, key: (B, H, N, D).
        means: (H, C, D) centroids.
        window: W.
        block_size: tokens a block of the mask.

    Raises:
        ValueError: window is below 1.

    Example:
        >>> q = torch.randn(1, 2, 100, 16)
        >>> found = routing_block_mask(q, q, torch.randn(2, 4, 16), window=25)
        >>> found.block_mask.shape
        (1, 2, 100, 100)
    """
    if window < 1:
        raise ValueError(f"window {window} must be at least 1")
    batch, heads, length, _ = query.shape
    places = torch.arange(length, device=query.device)
    codes = []
    for x in (query, key):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        cluster = routing_distances(routing_normalize(wide), means).argmin(-1)
        codes.append(cluster * length + places)  # by cluster, then by place
    (own, query_order), (theirs, key_order) = (code.sort(-1) for code in codes)
    theirs = theirs.contiguous()
    stop = torch.searchsorted(theirs, own, right=True)
    begin = torch.searchsorted(theirs, own // max(length, 1) * length)
    begin = torch.maximum(begin, stop - window)

    def interval(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx >= begin[b, h, q_idx]) & (kv_idx < stop[b, h, q_idx])

    mask = create_block_mask(
        interval, batch, heads, length, length, block_size, device=query.device
    )
    return SortedRouting(mask, query_order, key_order)
