"""URPE attention on whole, padded, packed and continued sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from manyheads.attention.softmax.op import SoftmaxState, update_cache
from manyheads.attention.urpe.blocks import block_rows
from manyheads.attention.urpe.definition import check_factors, expand_factor
from manyheads.attention.urpe.fast import urpe_blocked
from manyheads.attention.urpe.lse import urpe_from_lse
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["attend_cache", "urpe", "urpe_step", "urpe_update"]

Implementation = Literal["auto", "blocked", "lse", "dense"]
_IMPLEMENTATIONS = ("auto", "blocked", "lse", "dense")
_DENSE_ROWS = 8  # up to so many new queries meet a cache through plain matrices


def urpe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    count_padding: bool = False,
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """(C ∘ softmax(scale · Q Kᵀ + B)) V with relative bias B and relative multiplier C.

    Exact evaluation of its own definition. Rows of the attention matrix do not sum to 1: C is
    applied behind the softmax and never renormalised, and may be negative. With C = 1 it is
    softmax attention.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        bias: B; a table (H or 1, 2R − 1) by distance j − i, distance 0 in the middle, R >= N, M;
            or a matrix (H or 1, N, M); or (B or 1, H or 1, N, M). −inf hides a key.
        multiplier: C, in the same forms.
        is_causal: query i sees keys 0..i; needs N = M.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, M), True = a real token; for N = M. Padded tokens are as if absent: distances
            are counted among real tokens, outputs at padded places are 0. A query that sees no
            key gives 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M and tables.
        count_padding: True: ``mask`` only hides keys, as in official code. Padded places count in
            distances, all queries are answered, N and M may differ.
        dropout_p: probability by which entries of C ∘ softmax are dropped (the others grow).
        implementation: "blocked" (O(N + M) memory, no matrix made of tables), "dense" (plain
            autograd through the N x M matrix, differentiable twice), "lse" (through log-sum-exps,
            as other kernels would do it; no gradient to entries of C that are 0), or "auto":
            blocked.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.

    Example:
        >>> q = k = v = torch.randn(1, 2, 100, 16)
        >>> urpe(q, k, v, bias=torch.zeros(2, 199), multiplier=torch.ones(2, 199)).shape
        torch.Size([1, 2, 100, 16])
    """
    check_qkv(query, key, value, same_length=is_causal)
    check_factors(query, key, bias, multiplier)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p {dropout_p} must lie in [0, 1)")
    mask = check_mask(mask, key.shape[0], key.shape[2])
    factors = [f for f in (bias, multiplier) if f is not None]
    tables = [f for f in factors if f.ndim == 2]
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}

    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
        if len(tables) < len(factors) or query.shape[2] != key.shape[2]:
            raise ValueError("cu_seqlens needs queries and keys of one length, and tables")
        (out,) = map_packed(
            lambda q, k, v, m: urpe(
                q, k, v, bias=bias, multiplier=multiplier, mask=m,
                implementation=implementation, **options,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out

    if mask is None or count_padding:
        return _attend(query, key, value, bias, multiplier, mask, implementation, **options)
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"mask with query length {query.shape[2]} and key length {key.shape[2]}: between two "
            "sequences pass count_padding=True (distances by place, mask hides keys)"
        )
    if tables and len(tables) < len(factors):
        raise ValueError(
            "mask with a table and a matrix: distances of the table are counted among real "
            "tokens, those of the matrix by place; give both in one form or count_padding=True"
        )
    if len(tables) == len(factors):
        moved = compact(mask)
        q, k, v = (moved.gather(t, dim=2) for t in (query, key, value))
        # Real tokens in front never see the padding behind them when attention is causal.
        front = None if is_causal else moved.front
        out = _attend(q, k, v, bias, multiplier, front, implementation, **options)
        out = moved.scatter(out, dim=2)
    else:
        out = _attend(query, key, value, bias, multiplier, mask, implementation, **options)
    return out.masked_fill(~mask[:, None, :, None], 0)


def urpe_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, N, D); key, value: (B, H_kv, N, D and V).
        bias, multiplier: tables (H or 1, 2R − 1), R at least the tokens held afterwards.
        mask: (B, N), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, N, V) and the next state.

    Raises:
        ValueError: shapes do not fit, a factor is a matrix, or a table is too short.
    """

    def attend(query: Tensor, keys: Tensor, values: Tensor, before: Tensor) -> Tensor:
        return attend_cache(query, keys, values, before, bias, multiplier, scale=scale)

    return update_cache(state, query, key, value, mask, attend)


def urpe_step(
    state: SoftmaxState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V).
        bias, multiplier: as in :func:`urpe_update`; one row of each is used.

    Returns:
        The output (B, H, V) and the next state.
    """
    out, state = urpe_update(
        state,
        query[:, :, None],
        key[:, :, None],
        value[:, :, None],
        bias=bias,
        multiplier=multiplier,
        scale=scale,
    )
    return out[:, :, 0], state


def attend_cache(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from the newest tokens of a cache to all that it holds, causally.

    Args:
        query: (B, H, N, D), of tokens that the cache holds already, at places ``before`` on.
        keys, values: (B, H_kv, capacity, D and V).
        before: (B,) tokens held by each row before these.
        bias, multiplier: tables.
    """
    for name, factor in (("bias", bias), ("multiplier", multiplier)):
        if factor is not None and factor.ndim != 2:
            raise ValueError(f"{name} must be a table (H, 2R - 1) here: a sequence that grows")
    length = query.shape[2]
    start, high = int(before.min()), int(before.max())
    keys, values = keys[:, :, : high + length], values[:, :, : high + length]
    check_factors(query, keys, bias, multiplier)
    if start == high and length > _DENSE_ROWS:
        return _attend(
            query, keys, values, bias, multiplier, None, "blocked",
            is_causal=True, scale=scale, offset=high,
        )  # fmt: skip
    places = torch.arange(high + length, device=query.device)
    out = []
    rows = block_rows(high + length)
    for a in range(0, length, rows):
        here = torch.arange(a, min(a + rows, length), device=query.device)
        distance = places - (before[:, None] + here)[..., None]  # (B, r, M)
        if start == high:
            distance = distance[:1]
        b, c = (
            None if f is None else f[:, distance + f.shape[1] // 2].transpose(0, 1)
            for f in (bias, multiplier)
        )
        allowed = None if length == 1 and start == high else (distance <= 0)[:, None]
        part = query[:, :, a : a + rows]
        out.append(_dense(part, keys, values, b, c, allowed, scale=scale))
    return torch.cat(out, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    mask: Tensor | None,
    implementation: str,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float = 0.0,
    offset: int = 0,
) -> Tensor:
    length, keys = query.shape[2], key.shape[2]
    if implementation in ("auto", "blocked"):
        work = torch.promote_types(query.dtype, torch.float32)
        q, k, v, b, c = (
            None if t is None else t.to(work) for t in (query, key, value, bias, multiplier)
        )
        assert q is not None
        assert k is not None
        assert v is not None
        k, v = (repeat_kv(t, q.shape[1]) for t in (k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        out = urpe_blocked(
            q, k, v, b, c, mask,
            scale=scale, is_causal=is_causal, offset=offset, dropout_p=dropout_p,
        )  # fmt: skip
        return out.to(query.dtype)
    allowed = None
    if is_causal:
        allowed = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(offset)
    if mask is not None:
        allowed = mask[:, None, None] if allowed is None else allowed & mask[:, None, None]
    b, c = (
        None if f is None else expand_factor(f, length, keys, offset=offset)
        for f in (bias, multiplier)
    )
    if implementation == "dense":
        return _dense(query, key, value, b, c, allowed, scale=scale, dropout_p=dropout_p)
    if dropout_p:
        raise ValueError("implementation 'lse' has no dropout: use 'blocked' or 'dense'")
    return _lse(query, key, value, b, c, allowed, scale=scale)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    allowed: Tensor | None,
    *,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend through the whole matrix; factors are matrices, ``allowed`` is (..., N, M) bool."""
    batch, heads, length, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    work = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(work).reshape(batch, groups, -1, dim)  # (B, H_kv, H / H_kv · N, D)
    scores = grouped @ key.to(work).mT * (dim**-0.5 if scale is None else scale)
    scores = scores.view(batch, heads, length, keys)
    if bias is not None:
        scores = scores + bias.to(work)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if bias is None and allowed is None:
        weights = scores.softmax(-1)
    else:
        empty = torch.isneginf(scores).all(-1, keepdim=True)
        weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    if multiplier is not None:
        weights = weights * multiplier.to(work)
    if dropout_p:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    out = weights.view(batch, groups, -1, keys) @ value.to(work)
    return out.reshape(batch, heads, length, -1).to(query.dtype)


def _lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    allowed: Tensor | None,
    *,
    scale: float | None,
) -> Tensor:
    work = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    k, v = (repeat_kv(t.to(work), query.shape[1]) for t in (key, value))
    b = None if bias is None else bias.to(work)
    if allowed is not None:
        hidden = torch.zeros(allowed.shape, dtype=work, device=query.device)
        hidden = hidden.masked_fill(~allowed, -torch.inf)
        b = hidden if b is None else b + hidden
    c = k.new_ones(1, 1, 1, 1) if multiplier is None else multiplier.to(work)
    return urpe_from_lse(query.to(work) * scale, k, v, b, c).to(query.dtype)
