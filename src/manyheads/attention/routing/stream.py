"""Routing attention, strictly causal, block after block: the state of a layer.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values, C clusters,
W window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.routing.definition import RoutingState
from manyheads.attention.routing.op import check_routing, strict
from manyheads.layers.ragged import check_mask

__all__ = ["routing_init", "routing_update"]


def routing_init(
    batch: int,
    means: Tensor,
    *,
    window: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> RoutingState:
    """Return the state of the strictly causal form before the first token."""
    heads, clusters, dim = means.shape
    wide = torch.promote_types(dtype or means.dtype, torch.float32)
    sizes = (batch, heads, clusters, window)
    return RoutingState(
        means.new_zeros(*sizes, dim, dtype=wide),
        means.new_zeros(*sizes, dim if value_dim is None else value_dim, dtype=wide),
        torch.zeros(sizes[:3], dtype=torch.long, device=means.device),
    )


def routing_update(
    state: RoutingState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    window: int = 64,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 0.01,
) -> tuple[Tensor, RoutingState]:
    """Continue the strictly causal form with a block of tokens; arguments as :func:`routing`.

    Args:
        state: what an earlier call returned, or None at the start; its window counts.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_routing(query, key, value, means, window, relative_key, relative_value)
    mask = check_mask(mask, query.shape[0], query.shape[2])
    if state is not None:
        window = state.key.shape[3]
    out, k, theirs, v = strict(
        state,
        query,
        key,
        value,
        means,
        window=window,
        tables=(relative_key, relative_value),
        mask=mask,
        eps=eps,
    )
    if state is None:
        state = routing_init(k.shape[0], means, window=window, value_dim=v.shape[3], dtype=k.dtype)
    return out, _push(state, k, v, theirs)


def _push(state: RoutingState, k: Tensor, v: Tensor, theirs: Tensor) -> RoutingState:
    """Return the state with new members; theirs is C for tokens that join no cluster."""
    clusters, window = state.key.shape[2:4]
    order = theirs.argsort(dim=-1, stable=True)
    ordered = theirs.gather(-1, order)
    numbers = torch.arange(clusters + 1, device=k.device).expand(*theirs.shape[:2], -1)
    first = torch.searchsorted(ordered, numbers.contiguous())
    new = torch.searchsorted(ordered, numbers.contiguous(), right=True) - first
    total = state.members + new[..., :clusters]
    rank = torch.zeros_like(order).scatter(
        -1, order, torch.arange(order.shape[-1], device=k.device) - first.gather(-1, ordered)
    )
    joined = theirs.clamp_max(clusters - 1)
    rank = rank + state.members.gather(-1, joined)
    stays = (theirs < clusters) & (rank >= total.gather(-1, joined) - window)
    place = torch.where(stays, joined * window + rank % window, clusters * window)[..., None]
    parts = []
    for old, rows in ((state.key, k), (state.value, v)):
        flat = torch.cat((old.flatten(2, 3), torch.zeros_like(old[:, :, 0, :1])), 2)
        flat = flat.scatter(2, place.expand(rows.shape), rows.to(flat))
        parts.append(flat[:, :, :-1].unflatten(2, (clusters, window)))
    return RoutingState(parts[0], parts[1], total)
