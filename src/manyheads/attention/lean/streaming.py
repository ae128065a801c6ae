"""Lean attention on sequences that go on: blocks and tokens behind a key-value cache.

B batch, H heads, H_kv key-value heads, L new tokens, D head dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.lean.op import (
    IMPLEMENTATIONS,
    MANY_QUERIES,
    TILE,
    Implementation,
    lean,
)
from manyheads.attention.lean.plan import Order
from manyheads.attention.softmax.op import SoftmaxState, softmax_update
from manyheads.errors import unknown_name
from manyheads.layers.cache import append_tokens
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask, compact

__all__ = ["lean_step", "lean_update"]


def lean_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    workers: int | None = None,
    tile: int = TILE,
    order: Order = "request",
    implementation: Implementation = "auto",
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, L, D); key, value: (B, H_kv, L, D and V).
        scale, workers, tile, order, implementation: as in :func:`lean`.
        mask: (B, L), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, L, V) and the next state, which is a cache as softmax's.
    """
    check_qkv(query, key, value, same_length=True)
    batch, _, length, _ = query.shape
    mask = check_mask(mask, batch, length)
    if implementation not in IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, IMPLEMENTATIONS)
    first = state is None or state.key.shape[2] == 0
    if implementation == "sdpa" or (
        implementation == "auto" and (length > MANY_QUERIES or first or mask is not None)
    ):
        return softmax_update(state, query, key, value, scale=scale, mask=mask)
    late = None
    counts = torch.full((batch,), length, device=key.device)
    if mask is not None:
        counts, early, late = mask.sum(1), compact(mask), compact(~mask)
        key, value = early.gather(key, dim=2), early.gather(value, dim=2)
        query = late.gather(query, dim=2)
    if state is None:
        state = SoftmaxState(key[:, :, :0], value[:, :, :0], torch.zeros_like(counts))
    keys, values = append_tokens(state.key, state.value, state.length, key, value)
    held = state.length + counts
    out = lean(
        query, keys, values, lengths=held, is_causal=True, scale=scale, workers=workers,
        tile=tile, order=order, implementation=implementation,
    )  # fmt: skip
    if late is not None and mask is not None:
        out = late.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
    return out, SoftmaxState(keys, values, held)


def lean_step(
    state: SoftmaxState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    workers: int | None = None,
    tile: int = TILE,
    order: Order = "request",
    implementation: Implementation = "auto",
) -> tuple[Tensor, SoftmaxState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V).
        scale, workers, tile, order, implementation: as in :func:`lean`.

    Returns:
        The output (B, H, V) and the next state.
    """
    out, state = lean_update(
        state, query[:, :, None], key[:, :, None], value[:, :, None], scale=scale,
        workers=workers, tile=tile, order=order, implementation=implementation,
    )  # fmt: skip
    return out[:, :, 0], state
