"""The local heads beside routing heads: blocks that see themselves and their surroundings.

B batch, H heads, N length, D head dim, G blocks of I tokens, F flange: tokens seen before a block
(and behind it, where not causal).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.block_sparse.op import attend_visits
from manyheads.attention.routing.fast import attend_block
from manyheads.attention.routing.maps import local_visits
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["LocalState", "blocked_local", "blocked_local_init", "blocked_local_update"]

_Tables = tuple[Tensor | None, Tensor | None]


class LocalState(NamedTuple):
    """The last I + F tokens: ``key``, ``value`` (B, H, I + F, D), ``length`` (B,) tokens read.

    Token p stands at place p mod (I + F). Consumed by what it is handed to.
    """

    key: Tensor
    value: Tensor
    length: Tensor


def blocked_local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    flange: int,
    is_causal: bool = False,
    scale: float | None = None,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend to the own block and the F tokens before it, and behind it where not causal.

    O(N (I + 2 F) D). Without tables and dropout it is block-sparse attention on
    :func:`local_block_mask`, which has no second derivative. The relative distance is the key's
    place less the query's; where not causal it is F less than that, as official code measures
    from the end of what a block sees.

    Args:
        query, key, value: (B, H, N, D).
        block, flange: I and F.
        relative_key, relative_value: (2R + 1, D), clipped to ±R.
        mask, cu_seqlens: padding and packing; blocks are counted among real tokens.

    Returns:
        (B, H, N, D).
    """
    check_qkv(query, key, value, same_length=True)
    mask = check_mask(mask, query.shape[0], query.shape[2])
    if cu_seqlens is not None:
        (out,) = map_packed(
            lambda q, k, v, m: blocked_local(
                q, k, v, block=block, flange=flange, is_causal=is_causal, scale=scale,
                relative_key=relative_key, relative_value=relative_value, mask=m,
                dropout_p=dropout_p,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    length = query.shape[2]
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
    moved = None if mask is None else compact(mask)
    if moved is not None:
        q, k, v = (moved.gather(t, dim=2) for t in (q, k, v))
    if relative_key is None and relative_value is None and not dropout_p:
        visits = local_visits(
            length, block=block, flange=flange, is_causal=is_causal, device=q.device
        )
        out, _ = attend_visits(
            q * (q.shape[-1] ** -0.5 if scale is None else scale),
            k,
            v,
            visits,
            block_q=block,
            block_k=block,
            lengths=None if mask is None else mask.sum(1),
        )
        if moved is not None and mask is not None:
            out = moved.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
        return out.to(query.dtype)
    blocks = -(-length // block)
    fill = blocks * block - length
    ahead = 0 if is_causal else flange
    with torch.autocast(q.device.type, enabled=False):
        q = F.pad(q, (0, 0, 0, fill)).unflatten(2, (blocks, block))
        k, v = (
            F.pad(t, (0, 0, flange, fill + ahead))
            .unfold(2, flange + block + ahead, block)
            .transpose(-1, -2)
            for t in (k, v)
        )
        first = torch.arange(blocks, device=q.device)[:, None] * block
        places = first + torch.arange(-flange, block + ahead, device=q.device)  # (G, J)
        seen = (places >= 0) & (places < length)
        allowed = seen[:, None]
        if is_causal:
            rows = torch.arange(block, device=q.device)[:, None]
            allowed = allowed & (torch.arange(-flange, block, device=q.device) <= rows)
        elif moved is not None and mask is not None:
            counts = mask.sum(1)[:, None, None, None, None]
            allowed = allowed & (places[:, None] < counts)
        out = attend_block(
            q * (q.shape[-1] ** -0.5 if scale is None else scale),
            k,
            v,
            allowed,
            (relative_key, relative_value),
            shift=flange + ahead,
            dropout_p=dropout_p,
        )
    out = out.flatten(2, 3)[:, :, :length]
    if moved is not None and mask is not None:
        out = moved.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype)


def blocked_local_init(
    batch: int, heads: int, dim: int, *, block: int, flange: int, like: Tensor
) -> LocalState:
    """Return the state before the first token, on the device and in the dtype of ``like``."""
    wide = torch.promote_types(like.dtype, torch.float32)
    empty = like.new_zeros(batch, heads, block + flange, dim, dtype=wide)
    length = torch.zeros(batch, dtype=torch.long, device=like.device)
    return LocalState(empty, empty.clone(), length)


def blocked_local_update(
    state: LocalState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block: int,
    flange: int,
    scale: float | None = None,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, LocalState]:
    """Continue the causal form with any number of tokens; arguments as :func:`blocked_local`."""
    check_qkv(query, key, value, same_length=True)
    mask = check_mask(mask, query.shape[0], query.shape[2])
    dtype = state.key.dtype
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for a in range(0, query.shape[2], block):  # at most a block at once bounds the scores
        part = slice(a, a + block)
        q, k, v = (t[:, :, part].to(dtype) for t in (query, key, value))
        real = None if mask is None else mask[:, part]
        out, state = _piece(
            state, q * scale, k, v, real, block, flange, (relative_key, relative_value)
        )
        outputs.append(out)
    out = torch.cat(outputs, 2) if outputs else value
    return out.to(query.dtype), state


def _piece(
    state: LocalState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    block: int,
    flange: int,
    tables: _Tables,
) -> tuple[Tensor, LocalState]:
    ring = block + flange
    before = state.length[:, None]  # (B, 1)
    if real is None:
        real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device)
    places = before + (real.long().cumsum(1) - 1).clamp_min(0)  # (B, N)
    slots = torch.arange(ring, device=q.device)
    held = before - 1 - (before - 1 - slots) % ring  # (B, I + F), below 0 where nothing is held
    key_places = torch.cat((held, places), 1)
    is_key = torch.cat((held >= 0, real), 1)
    distance = key_places[:, None] - places[..., None]  # (B, N, M)
    start = places // block * block - flange
    allowed = is_key[:, None] & (distance <= 0) & (key_places[:, None] >= start[..., None])
    out = attend_block(
        q,
        torch.cat((state.key, k), 2),
        torch.cat((state.value, v), 2),
        allowed[:, None],
        tables,
        distance=distance[:, None],
    ).masked_fill(~real[:, None, :, None], 0)
    slot = torch.where(real, places % ring, ring)[:, None, :, None]
    parts = []
    for old, rows in ((state.key, k), (state.value, v)):
        wide = torch.cat((old, torch.zeros_like(old[:, :, :1])), 2)
        parts.append(wide.scatter(2, slot.expand(rows.shape), rows)[:, :, :-1])
    return out, LocalState(parts[0], parts[1], state.length + real.sum(1))
