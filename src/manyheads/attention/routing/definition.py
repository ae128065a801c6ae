"""Routing attention by its definition, its parts, and one token at a time.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values, C clusters,
W window: tokens a cluster.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.heads import check_qkv

__all__ = [
    "NORM_EPS",
    "RoutingState",
    "Selection",
    "relative_rows",
    "routing_distances",
    "routing_normalize",
    "routing_reference",
    "routing_select",
    "routing_step",
    "take_rows",
]

NORM_EPS = 1e-6
_HIDDEN = -1e9

Selection = Literal["auto", "strict", "top", "official"]


class RoutingState(NamedTuple):
    """The last W members of every cluster: a state of constant size.

    ``key`` (B, H, C, W, D) after normalisation and ``value`` (B, H, C, W, V), float32 at least;
    ``members`` (B, H, C) how many were read: member r stands at place r mod W. Written in place
    by :func:`routing_step`: a state handed over is consumed.
    """

    key: Tensor
    value: Tensor
    members: Tensor


def routing_normalize(x: Tensor) -> Tensor:
    """Layer norm of (..., D) without gain or bias: what is routed and compared. |x| = sqrt(D)."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def routing_distances(x: Tensor, means: Tensor) -> Tensor:
    """Return minus the products of normalised x (B, H, N, D) and means (H, C, D): (B, H, N, C)."""
    return -(x @ means.to(x).mT)


def routing_select(
    distances: Tensor, window: int, *, lengths: Tensor | None = None, strided: bool = False
) -> Tensor:
    """Return the places of the W nearest tokens of each centroid, ascending: (B, H, C, W).

    Of equal distances the lowest places come first. Looks at the whole sequence.

    Args:
        distances: (B, H, N, C).
        window: W, at most N are taken.
        lengths: (B,) tokens of each row that may be chosen, at its front; what is chosen beyond
            them stands last.
        strided: take every (N // W)-th token in the order of distance instead: near and far ones.
    """
    length = distances.shape[2]
    size = min(window, length)
    far = distances.detach().mT  # (B, H, C, N)
    places = torch.arange(length, device=far.device)
    if lengths is not None:
        far = far.masked_fill(places >= lengths[:, None, None, None], torch.inf)
    if strided:
        held = lengths if lengths is not None else far.new_tensor([length], dtype=torch.long)
        step = (held // held.clamp(1, size)).clamp_min(1)  # (B,)
        rows = step[:, None] * torch.arange(size, device=far.device)
        index = rows[:, None, None].expand(*far.shape[:3], size)
        return far.argsort(dim=-1, stable=True).gather(-1, index).sort(dim=-1).values
    # topk may break ties as it likes; where a tie reaches the last place, they are broken by place.
    nearest = far.topk(size, largest=False)
    last = nearest.values.amax(-1, keepdim=True)
    # Whether there are such ties is a question to the numbers, which a compiled graph cannot ask.
    if not torch.compiler.is_compiling() and bool(((far <= last).sum(-1) == size).all()):
        return nearest.indices.sort(-1).values
    nearer, level = far < last, far == last
    room = size - nearer.sum(-1, keepdim=True)
    chosen = nearer | (level & (level.cumsum(-1) <= room))
    return length - torch.where(chosen, length - places, 0).topk(size).values


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows (..., M, D) of x (..., N, D) at an index (..., M)."""
    *lead, length, dim = x.shape
    base = torch.arange(math.prod(lead), device=x.device) * length
    flat = index + base.view(*lead, 1)
    return x.reshape(-1, dim).index_select(0, flat.flatten()).view(*index.shape, dim)


def relative_rows(table: Tensor, distance: Tensor) -> Tensor:
    """Rows (..., D) of a table (2R + 1, D) at distances (...), the farthest served by the ends."""
    reach = table.shape[0] // 2
    return table[distance.clamp(-reach, reach) + reach]


def routing_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    window: int = 64,
    is_causal: bool = False,
    selection: Selection = "auto",
    strided: bool = False,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    mask: Tensor | None = None,
    eps: float = 0.01,
) -> Tensor:
    """Cluster by cluster, or through the N x N matrix where causal: the oracle of the tests."""
    check_qkv(query, key, value, same_length=True)
    if selection == "auto":
        selection = "strict" if is_causal else "top"
    rows = []
    for b in range(query.shape[0]):
        real = torch.ones_like(query[b, 0, :, 0], dtype=torch.bool) if mask is None else mask[b]
        keep = torch.ones_like(real) if selection == "official" else real
        q, k, v = (t[b, :, keep] for t in (query, key, value))
        q, k = routing_normalize(q), routing_normalize(k)
        tables = relative_key, relative_value
        if selection == "strict":
            out = _strict_row(q, k, v, means, window, tables) / (1 + eps)
        else:
            official = selection == "official"
            hidden = ~real[keep] | official & (v == 0).all(-1)  # (H, N)
            flags = is_causal, official, strided
            out = _top_row(q, k, v, means, window, tables, flags, hidden, eps)
        whole = out.new_zeros(out.shape[0], len(real), out.shape[2])
        rows.append(whole.index_copy(1, keep.nonzero()[:, 0], out))
    return torch.stack(rows)


_Tables = tuple[Tensor | None, Tensor | None]


def _strict_row(
    q: Tensor, k: Tensor, v: Tensor, means: Tensor, window: int, tables: _Tables
) -> Tensor:
    own, theirs = ((x @ means.to(x).mT).argmax(-1) for x in (q, k))  # (H, N)
    same = (own[..., None] == theirs[:, None]).tril()
    newer = same.sum(-1, keepdim=True) - same.cumsum(-1)  # members after j, up to i
    allowed = same & (newer < window)
    return _attend(q, k, v, allowed, -newer, tables)


def _top_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    means: Tensor,
    window: int,
    tables: _Tables,
    flags: tuple[bool, bool, bool],
    hidden: Tensor,
    eps: float,
) -> Tensor:
    is_causal, official, strided = flags
    total, count = torch.zeros_like(v), torch.zeros_like(v[..., :1])
    if not v.shape[1]:
        return total
    q_index, k_index = (
        routing_select(routing_distances(x[None], means), window, strided=strided)[0]
        for x in (q, k)
    )
    ranks = torch.arange(q_index.shape[-1], device=q.device)
    for c in range(means.shape[1]):
        for h in range(q.shape[0]):
            i, j = q_index[h, c], k_index[h, c]
            allowed = ~hidden[h, j].expand(len(i), -1)
            if is_causal:
                before = ranks <= ranks[:, None] if official else j <= i[:, None]
                allowed = allowed & before
            one = _attend(
                q[h, i], k[h, j], v[h, j], allowed, ranks - ranks[:, None], tables, official
            )
            places = torch.zeros_like(total[..., 0]).long()[h, i] + h, i
            total = total.index_put(places, one, accumulate=True)
            count = count.index_put(places, torch.ones_like(one[:, :1]), accumulate=True)
    return total / (count + eps)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    distance: Tensor,
    tables: _Tables,
    uniform: bool = False,
) -> Tensor:
    """Softmax over allowed keys; where there is none 0, or as official code has it, uniform."""
    logits = q @ k.mT
    if tables[0] is not None:
        logits = logits + (q[..., None, :] * relative_rows(tables[0].to(q), distance)).sum(-1)
    weights = logits.masked_fill(~allowed, _HIDDEN).softmax(-1)
    if not uniform:
        weights = weights.masked_fill(~allowed, 0)
    out = weights @ v
    if tables[1] is not None:
        out = out + (weights[..., None] * relative_rows(tables[1].to(v), distance)).sum(-2)
    return out


def routing_step(
    state: RoutingState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    eps: float = 0.01,
) -> tuple[Tensor, RoutingState]:
    """Add one token to the strictly causal form in O(H (C + W) D) time and constant memory.

    Args:
        state: the state so far; consumed.
        query, key: (B, H, D); value: (B, H, V); means: (H, C, D).
        relative_key, relative_value, eps: as in :func:`manyheads.attention.routing`.

    Returns:
        The output (B, H, V) and the next state.
    """
    window, dtype = state.key.shape[3], state.key.dtype
    q, k = (routing_normalize(t.to(dtype)) for t in (query, key))
    v, centroids = value.to(dtype), means.to(dtype)
    own, theirs = ((x[:, :, None] @ centroids.mT)[:, :, 0].argmax(-1) for x in (q, k))
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    heads = torch.arange(q.shape[1], device=q.device)
    before = state.members[rows, heads, theirs]  # (B, H)
    place = rows, heads, theirs, before % window
    if torch.is_grad_enabled() and any(t.requires_grad for t in (k, v, state.key, state.value)):
        keys, values = state.key.index_put(place, k), state.value.index_put(place, v)
    else:
        keys, values = state.key.index_put_(place, k), state.value.index_put_(place, v)
    count = state.members.index_put((rows, heads, theirs), before + 1)
    total = count[rows, heads, own][..., None]  # (B, H, 1)
    slots = torch.arange(window, device=q.device)
    newer = (total - 1 - slots) % window
    allowed = slots < total
    out = _attend(
        q[:, :, None],
        keys[rows, heads, own],
        values[rows, heads, own],
        allowed[:, :, None],
        -newer[:, :, None],
        (relative_key, relative_value),
    )
    return (out[:, :, 0] / (1 + eps)).to(query.dtype), RoutingState(keys, values, count)
