"""Clipped softmax attention on whole, padded, packed and continued sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from manyheads.attention.clipped_softmax.definition import check_stretch, stretch
from manyheads.attention.clipped_softmax.fast import clipped_blocked
from manyheads.attention.softmax.op import SoftmaxState, update_cache
from manyheads.attention.urpe.blocks import block_rows
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["clipped_softmax", "clipped_softmax_step", "clipped_softmax_update"]

Implementation = Literal["auto", "blocked", "dense"]


def clipped_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float = -0.03,
    eta: float = 1.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """clip((eta − gamma) softmax(scale · Q Kᵀ) + gamma, 0, 1) V. Another function: needs training.

    Heads that have nothing to add reach weights of exactly 0 without huge scores, so that
    activations keep no outliers and quantise well (Bondarenko et al., 2306.12929). Rows do not
    sum to 1; gamma = 0 with eta = 1 is softmax attention. O(N M) time, O(N) memory.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        gamma: at most 0; a constant of the training length, −12 / length for instance.
        eta: at least 1.
        attn_mask: bool (True = may attend) or a bias added to the scores, broadcast to
            (B, H, N, M).
        is_causal: query i sees keys 0..i; needs N = M.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, M), True = a real key; with ``is_causal`` padding may stand on either side.
            A query that sees no key gives 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M.
        implementation: "blocked" (rows of queries at a time, no gradient to ``attn_mask``),
            "dense" (the whole matrix), "auto" (blocked where it can).

    Returns:
        (B, H, N, V).

    Raises:
        ValueError: shapes do not fit, or gamma or eta is on the wrong side.

    Example:
        >>> q = k = v = torch.randn(1, 2, 10, 16)
        >>> clipped_softmax(q, k, v, gamma=-0.03, is_causal=True).shape
        torch.Size([1, 2, 10, 16])
    """
    check_qkv(query, key, value, same_length=is_causal)
    check_stretch(gamma, eta)
    if implementation not in ("auto", "blocked", "dense"):
        raise unknown_name("implementation", implementation, ("auto", "blocked", "dense"))
    mask = check_mask(mask, key.shape[0], key.shape[2])
    options: dict[str, Any] = {"gamma": gamma, "eta": eta, "is_causal": is_causal, "scale": scale}
    if cu_seqlens is not None:
        if mask is not None or attn_mask is not None:
            raise ValueError("cu_seqlens excludes mask and attn_mask: packed tokens are all real")
        (out,) = map_packed(
            lambda q, k, v, m: clipped_softmax(
                q, k, v, mask=m, implementation=implementation, **options
            ),
            (query, key, value),
            cu_seqlens,
        )
        return out
    bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
    dense = implementation == "dense"
    if bias is not None and bias.requires_grad:
        if implementation == "blocked":
            raise ValueError(
                "attn_mask wants a gradient, which 'blocked' does not give: use 'dense'"
            )
        dense = True
    if mask is not None and is_causal and bias is None:
        # Real tokens moved to the front never see the padding behind them: no mask is needed.
        moved = compact(mask)
        q, k, v = (moved.gather(t, dim=2) for t in (query, key, value))
        out = moved.scatter(_attend(q, k, v, None, None, dense, **options), dim=2)
    else:
        out = _attend(query, key, value, bias, mask, dense, **options)
    if mask is not None and is_causal:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out


def clipped_softmax_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float = -0.03,
    eta: float = 1.0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, N, D); key, value: (B, H_kv, N, D and V).
        gamma, eta, scale: as in :func:`clipped_softmax`.
        mask: (B, N), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_stretch(gamma, eta)

    def attend(query: Tensor, keys: Tensor, values: Tensor, before: Tensor) -> Tensor:
        length, start, high = query.shape[2], int(before.min()), int(before.max())
        keys, values = keys[:, :, : high + length], values[:, :, : high + length]
        if start == high and length > 1:
            return _attend(
                query, keys, values, None, None, False,
                gamma=gamma, eta=eta, scale=scale, is_causal=True, offset=high,
            )  # fmt: skip
        places = torch.arange(high + length, device=query.device)
        rows, out = block_rows(high + length), []
        for a in range(0, length, rows):
            here = torch.arange(a, min(a + rows, length), device=query.device)
            allowed = None
            if length > 1 or start < high:
                allowed = (places <= (before[:, None] + here)[..., None])[:, None]
            part = query[:, :, a : a + rows]
            out.append(_dense(part, keys, values, None, allowed, gamma=gamma, eta=eta, scale=scale))
        return torch.cat(out, 2)

    return update_cache(state, query, key, value, mask, attend)


def clipped_softmax_step(
    state: SoftmaxState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    gamma: float = -0.03,
    eta: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V).
        gamma, eta, scale: as in :func:`clipped_softmax`.

    Returns:
        The output (B, H, V) and the next state.
    """
    q, k, v = query[:, :, None], key[:, :, None], value[:, :, None]
    out, state = clipped_softmax_update(state, q, k, v, gamma=gamma, eta=eta, scale=scale)
    return out[:, :, 0], state


def _as_bias(attn_mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return a mask or bias as (B or 1, H or 1, N, M), in the dtype of the scores."""
    work = torch.promote_types(query.dtype, torch.float32)
    if attn_mask.dtype == torch.bool:
        zero = torch.zeros(attn_mask.shape, dtype=work, device=query.device)
        attn_mask = zero.masked_fill(~attn_mask, -torch.inf)
    bias = attn_mask.to(work)[(None,) * max(0, 4 - attn_mask.ndim)]
    size = (query.shape[2], key.shape[2])
    if any(n not in (1, m) for n, m in zip(bias.shape, (*query.shape[:2], *size), strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(attn_mask.shape)}, which does not broadcast to "
            f"(batch, heads, queries, keys) = {(*query.shape[:2], *size)}"
        )
    return bias.expand(*bias.shape[:2], *size)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dense: bool,
    *,
    gamma: float,
    eta: float,
    is_causal: bool,
    scale: float | None,
    offset: int = 0,
) -> Tensor:
    if not dense:
        work = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (t.to(work) for t in (query, key, value))
        k, v = (repeat_kv(t, q.shape[1]) for t in (k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = clipped_blocked(
            q, k, v, bias, mask,
            scale=scale, is_causal=is_causal, gamma=gamma, eta=eta, offset=offset,
        )  # fmt: skip
        return out.to(query.dtype)
    allowed = None
    if is_causal:
        shape = query.shape[2], key.shape[2]
        allowed = torch.ones(shape, dtype=torch.bool, device=query.device).tril(offset)
    if mask is not None:
        allowed = mask[:, None, None] if allowed is None else allowed & mask[:, None, None]
    return _dense(query, key, value, bias, allowed, gamma=gamma, eta=eta, scale=scale)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    *,
    gamma: float,
    eta: float,
    scale: float | None,
) -> Tensor:
    """Attend through the whole matrix; ``allowed`` is bool, broadcast to (B, H, N, M)."""
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    work = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(work).reshape(batch, groups, -1, dim)  # (B, H_kv, H / H_kv · N, D)
    scores = grouped @ key.to(work).mT * (dim**-0.5 if scale is None else scale)
    scores = scores.view(batch, heads, length, keys)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if bias is not None or allowed is not None:
        empty = torch.isneginf(scores).all(-1, keepdim=True)
        p = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    else:
        p = scores.softmax(-1)
    weights = stretch(p, gamma=gamma, eta=eta).view(batch, groups, -1, keys)
    return (weights @ value.to(work)).reshape(batch, heads, length, -1).to(query.dtype)
