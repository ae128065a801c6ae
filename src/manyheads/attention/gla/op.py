"""The public function: gated linear attention on whole, padded, packed and continued sequences."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.attention.gla.definition import (
    GLAState,
    check_log_decay,
    gla_recurrence,
    gla_weights,
)
from manyheads.attention.gla.fast import gla_chunked
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, map_packed
from manyheads.layers.recurrent import has_short_scan, short_scan

__all__ = ["gla", "gla_update"]

Implementation = Literal["auto", "chunked", "recurrent", "parallel"]
_IMPLEMENTATIONS = ("auto", "chunked", "recurrent", "parallel")
_RECURRENT_BELOW = 16


def gla(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> Tensor:
    """Gated linear attention, causal. Not softmax: needs training.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, N, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, N, V).
        log_decay: (B, H_kv, N, D), natural log of the forget gate, <= 0 and finite.
        scale: factor on the query, D ** -0.5 unless given.
        mask: (B, N), True = a real token; padded tokens neither decay nor enter the state, and
            their outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each starts afresh.
        chunk_size: tokens a chunk; changes speed, not the result.
        implementation: "chunked" (matrix products, O(N)), "recurrent" (the definition),
            "parallel" (through the N x N matrix), or "auto": recurrent below 16 tokens.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, or the implementation is unknown.

    Example:
        >>> q = k = v = torch.randn(1, 2, 100, 16)
        >>> gla(q, k, v, torch.full_like(k, -0.1)).shape
        torch.Size([1, 2, 100, 16])
    """
    return gla_update(
        None,
        query,
        key,
        value,
        log_decay,
        scale=scale,
        mask=mask,
        cu_seqlens=cu_seqlens,
        chunk_size=chunk_size,
        implementation=implementation,
    )[0]


def gla_update(
    state: GLAState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    implementation: Implementation = "auto",
) -> tuple[Tensor, GLAState]:
    """Continue from a state with a block of tokens; arguments as :func:`gla`.

    Args:
        state: what an earlier call returned, or None at the start; with ``cu_seqlens`` its batch
            is the number of sequences.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_qkv(query, key, value, same_length=True)
    check_log_decay(key, log_decay)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    if scale is None:
        scale = dim**-0.5
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")

        def run(q, k, v, g, memory, row_mask):  # type: ignore[no-untyped-def]
            own = None if memory is None else GLAState(memory)
            out, (final,) = gla_update(
                own, q, k, v, g, scale=scale, mask=row_mask, chunk_size=chunk_size,
                implementation=implementation,
            )  # fmt: skip
            return out, final

        states = None if state is None else state.memory
        out, final = map_packed(
            run, (query, key, value, log_decay), cu_seqlens, per_sequence=(states,)
        )
        return out, GLAState(final)

    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v, g = (t.to(work) for t in (query, key, value, log_decay))
    k, v, g = (repeat_kv(t, heads) for t in (k, v, g))
    if mask is not None:
        drop = ~mask[:, None, :, None]
        k, g = k.masked_fill(drop, 0), g.masked_fill(drop, 0)
        v = v.masked_fill(drop, 0)
    if state is None:
        memory = q.new_zeros(batch, heads, dim, v.shape[-1])
    else:
        memory = state.memory.to(work)
    short = implementation == "auto" and has_short_scan(q, k, v, g, memory)
    if implementation == "auto":
        implementation = "recurrent" if length < _RECURRENT_BELOW else "chunked"
    if length == 0:
        out = q.new_zeros(batch, heads, 0, v.shape[-1])
    elif short:
        out, memory = short_scan(q * scale, k, v, g, memory)
    elif implementation == "recurrent":
        out, memory = gla_recurrence(q, k, v, g, memory, scale=scale)
    elif implementation == "parallel":
        out, memory = _parallel(q, k, v, g, memory, scale)
    else:
        size = min(chunk_size, length)
        out, memory = gla_chunked(q, k, v, g, memory, scale=scale, chunk_size=size)
    if mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype), GLAState(memory)


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    b = g.cumsum(2)
    total = b[:, :, -1:]
    out = gla_weights(q, k, g, scale=scale) @ v + scale * (q * b.exp()) @ memory
    return out, total.exp().mT * memory + (k * (total - b).exp()).mT @ v
