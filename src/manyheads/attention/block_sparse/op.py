"""Softmax attention over listed key blocks: the operators, forward and backward.

In float32 on the CPU a kernel runs (``csrc/sparse.cpp``), elsewhere batched matrix products over
gathered blocks. Backward in closed form from the saved log-sum-exp: scores are made again, and
nothing of N x M is held.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.block_sparse.gathered import Gathered, joined
from manyheads.attention.block_sparse.visits import Visits, turn
from manyheads.layers.blocks import block_count, cut
from manyheads.layers.precision import without_autocast
from manyheads.native import library

__all__ = ["attend_visits"]


def attend_visits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visits: Visits,
    *,
    block_q: int,
    block_k: int,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax of each query over the tokens of the key blocks that its block lists.

    A list names a key block once at most. Gradients reach query, key and value.

    Args:
        query: (B, H, N, D), scaled.
        key, value: (B, H_kv, M, D and V).
        visits: the lists.
        block_q, block_k: tokens a block.
        lengths: (B) real keys, which stand at the front, or None for all.

    Returns:
        (B, H, N, V), and the log-sum-exp of the scores (B, H, N, 1), without gradient. A query
        without any key gives 0, and the least finite number.
    """
    out: tuple[Tensor, Tensor] = _op(query, key, value, *visits, lengths, block_q, block_k)
    return out


@torch.library.custom_op("manyheads::block_sparse", mutates_args=())
@without_autocast
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    columns: Tensor,
    batch: int,
    heads: int,
    which: Tensor | None,
    bits: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    visits = Visits(offsets, columns, batch, heads, which, bits)
    if (lib := library("sparse", like=query)) is not None:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        lse = query.new_empty(*query.shape[:3], 1)
        scratch, sizes = _scratch_and_sizes(query, key, value, visits, block_q, block_k)
        q, k, v = (t.contiguous() for t in (query, key, value))
        lib("sparse_forward", q, k, v, *_lists(visits, lengths), out, lse, scratch, *sizes)
        return out, lse
    gathered = Gathered(query, key, value, visits, lengths, block_q, block_k)
    q = cut(query, block_q).flatten(0, 2)  # (BHP, block_q, D)
    out = q.new_empty(*q.shape[:2], value.shape[3])
    lse = q.new_empty(*q.shape[:2], 1)
    for chunk in gathered:
        keys, values = gathered.take(chunk)
        scores = torch.bmm(q[chunk.rows], keys.mT)
        if chunk.absent is not None:
            scores.masked_fill_(chunk.absent, -torch.inf)
        # A row without a key has -inf throughout: its weights become 0, not NaN.
        top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        out[chunk.rows] = torch.bmm(scores, values).div_(total)
        lse[chunk.rows] = top.add_(total.log_())
    return joined(out, query), joined(lse, query)


@_op.register_fake
def _(query, key, value, *_):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(*shape, 1)


@torch.library.custom_op("manyheads::block_sparse_backward", mutates_args=())
@without_autocast
def _backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor,
    columns: Tensor,
    batch: int,
    heads: int,
    which: Tensor | None,
    bits: Tensor | None,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    visits = Visits(offsets, columns, batch, heads, which, bits)
    delta = (out * grad).sum(-1, keepdim=True)
    if (lib := library("sparse", like=query)) is not None:
        dq, dk, dv = (t.new_empty(t.shape) for t in (query, key, value))
        scratch, sizes = _scratch_and_sizes(query, key, value, visits, block_q, block_k)
        given = [t.contiguous() for t in (grad, query, key, value, lse, delta)]
        turned = turn(visits, block_count(key.shape[2], block_k))
        lib("sparse_backward", *given, *_lists(visits, lengths), *turned, dq, dk, dv, scratch,
            *sizes)  # fmt: skip
        return dq, dk, dv
    gathered = Gathered(query, key, value, visits, lengths, block_q, block_k)
    q, g, sums, deltas = (cut(t, block_q).flatten(0, 2) for t in (query, grad, lse, delta))
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(gathered.key), torch.zeros_like(gathered.value)
    for chunk in gathered:
        rows = chunk.rows
        keys, values = gathered.take(chunk)
        weights = torch.bmm(q[rows], keys.mT)
        if chunk.absent is not None:
            weights.masked_fill_(chunk.absent, -torch.inf)
        weights.sub_(sums[rows]).exp_()
        dv.index_add_(0, chunk.blocks, torch.bmm(weights.mT, g[rows]).view(-1, *dv.shape[1:]))
        slope = torch.bmm(g[rows], values.mT).sub_(deltas[rows]).mul_(weights)
        dq[rows] = torch.bmm(slope, keys)
        dk.index_add_(0, chunk.blocks, torch.bmm(slope.mT, q[rows]).view(-1, *dk.shape[1:]))
    return joined(dq, query), gathered.whole(dk, key), gathered.whole(dv, value)


@_backward_op.register_fake
def _(grad, query, key, value, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, offsets, columns, batch, heads, which, bits, lengths, *blocks = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, offsets, columns, which, bits, lengths)
    ctx.numbers = batch, heads, *blocks


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, offsets, columns, which, bits, lengths = ctx.saved_tensors
    batch, heads, block_q, block_k = ctx.numbers
    grads = _backward_op(
        grad, query, key, value, out, lse, offsets, columns, batch, heads, which, bits, lengths,
        block_q, block_k,
    )  # fmt: skip
    return *grads, *(None,) * 9


_op.register_autograd(_backward, setup_context=_context)


def _lists(visits: Visits, lengths: Tensor | None) -> tuple[Tensor | None, ...]:
    given = (visits.offsets, visits.columns, visits.which, visits.bits, lengths)
    return tuple(None if t is None else t.contiguous() for t in given)


def _scratch_and_sizes(
    query: Tensor, key: Tensor, value: Tensor, visits: Visits, block_q: int, block_k: int
) -> tuple[Tensor, tuple[int, ...]]:
    largest = (min(block_q, query.shape[2]), min(block_k, key.shape[2]))
    q, k, d, v = (-(-n // 16) * 16 for n in (*largest, key.shape[3], value.shape[3]))
    numbers = 2 * q * k + 3 * max(q, k) * (d + v) + 8 * max(q, k)  # as scratch_of in sparse.cpp
    threads = torch.get_num_threads()
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], key.shape[3],
             value.shape[3], block_q, block_k, visits.batch, visits.heads, threads)  # fmt: skip
    return query.new_empty(threads * numbers), sizes
