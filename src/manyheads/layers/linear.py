"""Causal linear attention without decay, by chunks: the product that several mechanisms share.

out_t = q_tᵀ (S_0 + Σ_{j<=t} k_j v_jᵀ), for queries and keys that went through their feature maps.
B batch, H heads, N length, D key dim, V value dim, n chunks of C tokens.

Time 2NC(D+V) + 4NDV FLOPs a head, forward; no (N, N) and no (N, D, V) tensor is ever made: what
backward keeps is one (D, V) memory a chunk. Works through tiles whose temporaries stay in the
processor's cache; backward is in closed form.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast

__all__ = ["cache_tiles", "causal_linear", "cut_chunks"]

_TILE_NUMBERS = 1 << 18  # numbers in one (B, H, tile, D) temporary: 1 MiB in float32


def causal_linear(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Return q_tᵀ (S_0 + Σ_{j<=t} k_j v_jᵀ) for all t, and the last memory.

    Nothing is scaled or normalised. Half precision is computed in float32.

    Args:
        query, key: (B, H, N, D); a key of zeros leaves the memory as it is.
        value: (B, H, N, V).
        state: S_0 (B, H, D, V), zeros if None; not changed.
        chunk_size: tokens a chunk; changes speed, not the result.

    Returns:
        (B, H, N, V) in the dtype of ``query``, and the memory after the last token, (B, H, D, V)
        in float32 or float64.

    Raises:
        ValueError: shapes that do not fit, or a chunk_size below 1.
    """
    _check(query, key, value, state, chunk_size)
    batch, heads, length, dim = query.shape
    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(work) for t in (query, key, value))
    memory = q.new_zeros(batch, heads, dim, v.shape[-1]) if state is None else state.to(work)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, memory))
    size = max(1, min(chunk_size, length))
    out, final, _ = _forward_op(q, k, v, memory, size, keep)
    return out.to(query.dtype), final


@torch.library.custom_op("manyheads::causal_linear", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, memory: Tensor, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs, the last memory and, if ``keep``, the memory before each chunk."""
    batch, heads, length, dim = query.shape
    out = query.new_empty(batch, heads, length, value.shape[-1])
    chunks = -(-length // chunk_size) if keep else 0
    states = query.new_empty(batch, heads, chunks, dim, value.shape[-1])
    final = memory.clone()
    for rows, spans in cache_tiles(query, chunk_size):
        carried = final[rows]
        for start, stop in spans:
            q, k, v = cut_chunks((query, key, value), rows, start, stop, chunk_size)
            added = k.mT @ v  # (B, H, n, D, V)
            first, count = start // chunk_size, added.shape[2]
            before = states[rows, :, first : first + count] if keep else torch.empty_like(added)
            for i in range(count):
                before[:, :, i] = carried
                carried += added[:, :, i]
            o = (q @ k.mT).tril_() @ v
            o += q @ before
            out[rows, :, start:stop] = o.flatten(2, 3)[:, :, : stop - start]
    return out, final, states


@_forward_op.register_fake
def _(query, key, value, memory, chunk_size, keep):  # type: ignore[no-untyped-def]
    batch, heads, length, dim = query.shape
    chunks = -(-length // chunk_size) if keep else 0
    return (
        query.new_empty(batch, heads, length, value.shape[-1]),
        torch.empty_like(memory),
        query.new_empty(batch, heads, chunks, dim, value.shape[-1]),
    )


@torch.library.custom_op("manyheads::causal_linear_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    states: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk the tiles backwards with the gradient of the memory."""
    grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
    grad_memory = grad_final.clone()
    for rows, spans in cache_tiles(query, chunk_size):
        carried = grad_memory[rows]
        for start, stop in reversed(spans):
            q, k, v, do = cut_chunks((query, key, value, grad_out), rows, start, stop, chunk_size)
            first, count = start // chunk_size, q.shape[2]
            before = states[rows, :, first : first + count]
            added = q.mT @ do
            beyond = torch.empty_like(added)  # gradient of the memory after each chunk
            for i in reversed(range(count)):
                beyond[:, :, i] = carried
                carried += added[:, :, i]
            grad_scores = (do @ v.mT).tril_()
            dq = grad_scores @ k
            dq += do @ before.mT
            dk = grad_scores.mT @ q
            dk += v @ beyond.mT
            dv = (q @ k.mT).tril_().mT @ do
            dv += k @ beyond
            for whole, part in ((grad_query, dq), (grad_key, dk), (grad_value, dv)):
                whole[rows, :, start:stop] = part.flatten(2, 3)[:, :, : stop - start]
    return grad_query, grad_key, grad_value, grad_memory


@_backward_op.register_fake
def _(query, key, value, states, grad_out, grad_final, chunk_size):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (query, key, value, grad_final))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, _, ctx.chunk_size, _ = inputs
    states = output[2]
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)  # a gradient of zeros for the states would be as large
    ctx.save_for_backward(query, key, value, states)


def _backward(ctx, grad_out, grad_final, _):  # type: ignore[no-untyped-def]
    query, _, value, _ = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(value)
    if grad_final is None:
        grad_final = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    grads = _backward_op(*ctx.saved_tensors, grad_out, grad_final.contiguous(), ctx.chunk_size)
    return (*grads, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def cache_tiles(query: Tensor, chunk_size: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Yield rows of the batch (B, H, N, D), and the spans of tokens to walk in order for them.

    A span is a number of whole chunks (the last one may be cut) whose (B, H, span, D) temporaries
    stay in the processor's cache.
    """
    batch, heads, length, dim = query.shape
    numbers = max(1, heads * chunk_size * dim)
    rows = max(1, min(batch, _TILE_NUMBERS // numbers))
    size = max(1, _TILE_NUMBERS // (rows * numbers)) * chunk_size
    spans = [(a, min(a + size, length)) for a in range(0, length, size)]
    for first in range(0, batch, rows):
        yield slice(first, first + rows), spans


def cut_chunks(
    tensors: tuple[Tensor, ...], rows: slice, start: int, stop: int, chunk_size: int
) -> tuple[Tensor, ...]:
    """Cut tokens start:stop to (B, H, n, C, ·); zeros fill the last chunk and change nothing."""
    missing = -(stop - start) % chunk_size
    parts = (t[rows, :, start:stop] for t in tensors)
    padded = (torch.nn.functional.pad(t, (0, 0, 0, missing)) if missing else t for t in parts)
    return tuple(t.unflatten(2, (-1, chunk_size)) for t in padded)


def _check(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor | None, chunk_size: int
) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.ndim != 4:
            raise ValueError(f"{name} has {t.ndim} axes, expected (batch, heads, length, head_dim)")
    if query.shape != key.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ: repeat the key heads "
            "(layers.heads.repeat_kv), and give one key for each query"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value {tuple(value.shape)} and key {tuple(key.shape)} differ in batch, heads or "
            "length: give one value for each key"
        )
    wanted = (*query.shape[:2], query.shape[-1], value.shape[-1])
    if state is not None and state.shape != wanted:
        raise ValueError(
            f"state has shape {tuple(state.shape)}, expected (batch, heads, D, V) = {wanted}"
        )
