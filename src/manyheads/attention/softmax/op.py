"""Softmax attention on whole, padded, packed and continued sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.cache import append_tokens
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["SoftmaxState", "softmax", "softmax_step", "softmax_update", "update_cache"]

_QUERY_BLOCK = 512  # rows of queries that meet a cache at once: bounds the mask that is made


class SoftmaxState(NamedTuple):
    """A key-value cache with free places at its end.

    ``key`` (B, H_kv, capacity, D), ``value`` (B, H_kv, capacity, V), ``length`` (B,) tokens held
    in each row. Tokens are written in place: the state handed over is consumed.
    """

    key: Tensor
    value: Tensor
    length: Tensor


def softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Softmax attention through torch's scaled_dot_product_attention. Exact; O(N M) time.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        attn_mask: bool (True = may attend) or a bias added to the scores, broadcast to
            (B, H, N, M).
        is_causal: query i sees keys 0..i; needs N = M.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, M), True = a real key; with ``is_causal`` padding may stand on either side.
            A query that sees no key gives 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M.

    Returns:
        (B, H, N, V).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q = k = v = torch.randn(1, 2, 10, 16)
        >>> softmax(q, k, v, is_causal=True).shape
        torch.Size([1, 2, 10, 16])
    """
    check_qkv(query, key, value, same_length=is_causal)
    mask = check_mask(mask, key.shape[0], key.shape[2])
    if cu_seqlens is not None:
        if mask is not None or attn_mask is not None:
            raise ValueError("cu_seqlens excludes mask and attn_mask: packed tokens are all real")
        (out,) = map_packed(
            lambda q, k, v, m: softmax(q, k, v, is_causal=is_causal, scale=scale, mask=m),
            (query, key, value),
            cu_seqlens,
        )
        return out
    if mask is None:
        return _sdpa(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
    if is_causal and attn_mask is None:
        # Real tokens moved to the front never see the padding behind them: no mask is needed.
        moved = compact(mask)
        parts = (moved.gather(t, dim=2) for t in (query, key, value))
        q, k, v = parts
        out = moved.scatter(_sdpa(q, k, v, None, is_causal=True, scale=scale), dim=2)
        return out.masked_fill(~mask[:, None, :, None], 0)
    allowed = mask[:, None, None]
    if is_causal:
        allowed = allowed & mask.new_ones(mask.shape[1], mask.shape[1]).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed, attn_mask = allowed & attn_mask, None
    empty = ~allowed.any(-1, keepdim=True)
    if attn_mask is not None:
        bias = attn_mask.masked_fill(~(allowed | empty), -torch.inf)
    else:
        bias = allowed | empty
    bias = bias.expand(-1, -1, query.shape[2], -1)
    return _sdpa(query, key, value, bias, is_causal=False, scale=scale).masked_fill(empty, 0)


def softmax_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, N, D); key, value: (B, H_kv, N, D and V).
        mask: (B, N), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, N, V) and the next state.
    """

    def attend(query: Tensor, keys: Tensor, values: Tensor, before: Tensor) -> Tensor:
        return _attend_cache(query, keys, values, before, scale=scale)

    return update_cache(state, query, key, value, mask, attend)


def update_cache(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and let ``attend`` read it: for what else keeps one.

    Args:
        state, query, key, value, mask: as in :func:`softmax_update`.
        attend: called with the queries (B, H, N, D), real ones first in each row, the keys and
            values of the cache (B, H_kv, capacity, D and V), which hold the new tokens already,
            and how many tokens each row held before (B,); returns (B, H, N, V).
    """
    check_qkv(query, key, value, same_length=True)
    batch, _, length, _ = query.shape
    mask = check_mask(mask, batch, length)
    moved = None if mask is None else compact(mask)
    if moved is not None:
        query, key, value = (moved.gather(t, dim=2) for t in (query, key, value))
    counts = key.new_full((batch,), length, dtype=torch.long) if mask is None else mask.sum(1)
    if state is None:
        state = SoftmaxState(key[:, :, :0], value[:, :, :0], counts.new_zeros(batch))
    before = state.length
    keys, values = append_tokens(state.key, state.value, before, key, value)
    out = attend(query, keys, values, before)
    if moved is not None and mask is not None:
        out = moved.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
    return out, SoftmaxState(keys, values, before + counts)


def _attend_cache(
    query: Tensor, keys: Tensor, values: Tensor, before: Tensor, *, scale: float | None
) -> Tensor:
    length, start, high = query.shape[2], int(before.min()), int(before.max())
    keys, values = keys[:, :, : high + length], values[:, :, : high + length]
    if high == 0:
        return _sdpa(query, keys, values, None, is_causal=True, scale=scale)
    if length == 1 and start == high:
        return _sdpa(query, keys, values, None, scale=scale)
    places = torch.arange(high + length, device=keys.device)
    blocks = []
    for a in range(0, length, _QUERY_BLOCK):
        rows = torch.arange(a, min(a + _QUERY_BLOCK, length), device=keys.device)
        allowed = places <= (before[:, None] + rows)[..., None]  # (B, rows, M)
        q = query[:, :, a : a + _QUERY_BLOCK]
        blocks.append(_sdpa(q, keys, values, allowed[:, None], scale=scale))
    return torch.cat(blocks, 2)


def softmax_step(
    state: SoftmaxState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V).

    Returns:
        The output (B, H, V) and the next state.
    """
    out, state = softmax_update(
        state, query[:, :, None], key[:, :, None], value[:, :, None], scale=scale
    )
    return out[:, :, 0], state


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=bias,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
