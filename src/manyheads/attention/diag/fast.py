"""Block-local attention in cache-sized segments, with a closed-form backward.

B batch, H heads, n blocks of C tokens, D key dim, V value dim.

Every block is a small dense attention; a segment of blocks is one batched matrix product whose
scores stay in the processor's cache. Backward makes the scores again instead of keeping them, so
that nothing is held beyond the inputs. Where a key must not be seen (behind the last real token,
or ahead in time) its score is the least finite number: a row without any key stays finite, and
is zeroed by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["diag_blocks", "diag_plain"]

_SEGMENT_NUMBERS = 1 << 18  # numbers in the scores of one segment: 1 MiB in float32


def diag_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    *,
    scale: float,
    block_size: int,
    is_causal: bool,
    kind: str,
    mask_late: bool,
) -> Tensor:
    """Return the outputs (B, H, N, V) of N tokens in blocks that start at the first.

    Args:
        query, key, value: of one dtype, float32 or float64; what stands behind the last real
            token must be zero.
        counts: (B,) number of keys that count in each row, the first ones, at most N rounded up
            to whole blocks (the keys behind N are zero); None: N.
        mask_late: whether the future is removed after the softmax.
    """
    if counts is None and query.shape[2] % block_size:
        counts = torch.full((query.shape[0],), query.shape[2], device=query.device)
    if kind == "relu" or (is_causal and not mask_late):
        counts = None  # zero keys weigh nothing under relu, and stand behind every real query
    return _forward_op(query, key, value, counts, scale, block_size, is_causal, kind, mask_late)


def diag_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    *,
    scale: float,
    block_size: int,
    is_causal: bool,
    kind: str,
    mask_late: bool,
    dropout_p: float,
) -> Tensor:
    """As :func:`diag_blocks`, all blocks at once under autograd, with dropout on the weights."""
    batch, _, length, _ = query.shape
    if counts is None:
        counts = torch.full((batch,), length, device=query.device)
    spans = slice(None), 0, length, block_size
    q, k, v = _blocks((query * scale, key, value), *spans)
    unseen = _unseen(counts, *spans)
    _, used = _weights(q, k, unseen, is_causal, kind, mask_late)
    return (F.dropout(used, dropout_p) @ v).flatten(2, 3)[:, :, :length]


@torch.library.custom_op("manyheads::diag_blocks", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor | None,
    scale: float,
    block_size: int,
    is_causal: bool,
    kind: str,
    mask_late: bool,
) -> Tensor:
    out = _empty_out(query, value)
    with torch.autocast(query.device.type, enabled=False):
        for rows, start, stop in _segments(query, block_size):
            q, k, v = _blocks((query, key, value), rows, start, stop, block_size)
            unseen = _unseen(counts, rows, start, stop, block_size)
            _, used = _weights(q * scale, k, unseen, is_causal, kind, mask_late)
            out[rows, :, start:stop] = (used @ v).flatten(2, 3)[:, :, : stop - start]
    return out


@_forward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return _empty_out(query, value)


@torch.library.custom_op("manyheads::diag_blocks_backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    counts: Tensor | None,
    scale: float,
    block_size: int,
    is_causal: bool,
    kind: str,
    mask_late: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    with torch.autocast(query.device.type, enabled=False):
        for rows, start, stop in _segments(query, block_size):
            q, k, v, do = _blocks((query, key, value, grad_out), rows, start, stop, block_size)
            q = q * scale
            unseen = _unseen(counts, rows, start, stop, block_size)
            weights, used = _weights(q, k, unseen, is_causal, kind, mask_late)
            ds = do @ v.mT
            if kind == "relu":
                ds *= used > 0
            else:
                if is_causal and mask_late:
                    ds.tril_()
                ds *= weights
                ds = torch.addcmul(ds, weights, ds.sum(-1, keepdim=True), value=-1)
            parts = ((ds @ k).mul_(scale), ds.mT @ q, used.mT @ do)
            for whole, part in zip(grads, parts, strict=True):
                whole[rows, :, start:stop] = part.flatten(2, 3)[:, :, : stop - start]
    return grads


@_backward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, counts, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, counts)


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    query, key, value, counts = ctx.saved_tensors
    grads = _backward_op(query, key, value, grad_out, counts, *ctx.options)
    return (*grads, *(None for _ in range(6)))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _weights(
    q: Tensor, k: Tensor, unseen: Tensor | None, is_causal: bool, kind: str, mask_late: bool
) -> tuple[Tensor, Tensor]:
    """Return the weights (B, H, n, C, C) before and after the late mask (often the same)."""
    scores = q @ k.mT
    if kind == "relu":
        used = scores.relu_()
        return used, used.tril() if is_causal else used
    least = torch.finfo(scores.dtype).min
    if unseen is not None:
        scores = scores.masked_fill_(unseen, least)
    if is_causal and not mask_late:
        size = scores.shape[-1]
        future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(future, least)
    weights = scores.softmax(-1)
    return weights, weights.tril() if is_causal and mask_late else weights


def _empty_out(query: Tensor, value: Tensor) -> Tensor:
    """Return an empty (B, H, N, V) whose heads lie together for each token: merging is free."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def _segments(query: Tensor, block_size: int) -> Iterator[tuple[slice, int, int]]:
    """Yield rows of the batch and spans of tokens (whole blocks) that are worked on at once."""
    batch, heads, length, dim = query.shape
    numbers = heads * block_size * max(block_size, dim)
    rows = max(1, min(batch, _SEGMENT_NUMBERS // numbers))
    size = max(1, _SEGMENT_NUMBERS // (rows * numbers)) * block_size
    for first in range(0, batch, rows):
        for start in range(0, length, size):
            yield slice(first, first + rows), start, min(start + size, length)


def _blocks(
    tensors: tuple[Tensor, ...], rows: slice, start: int, stop: int, block_size: int
) -> tuple[Tensor, ...]:
    """Cut tokens start:stop to (B, H, n, C, ·), zeros behind the last."""
    missing = -(stop - start) % block_size
    parts = (t[rows, :, start:stop] for t in tensors)
    padded = (F.pad(t, (0, 0, 0, missing)) if missing else t for t in parts)
    return tuple(t.unflatten(2, (-1, block_size)) for t in padded)


def _unseen(
    counts: Tensor | None, rows: slice, start: int, stop: int, block_size: int
) -> Tensor | None:
    """Return which keys of the blocks do not count, (B, 1, n, 1, C)."""
    if counts is None:
        return None
    blocks = -(-(stop - start) // block_size)
    place = torch.arange(start, start + blocks * block_size, device=counts.device)
    return (place >= counts[rows, None]).unflatten(1, (blocks, block_size))[:, None, :, None]
