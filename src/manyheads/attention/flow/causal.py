"""Causal flow attention by chunks: one sweep, O(N) memory.

B batch, H heads, n chunks, C tokens a chunk, D key dim, V value dim.

Everything at token t depends on tokens up to t, so all flows, the competition and the outputs of
a tile are computed while its scores A = q kᵀ are in the cache: sinks read the lower triangle of
A, sources the upper one. The state is one tensor (B, H, D, V + 4): the memory Σ k (c v)ᵀ and the
columns Σ k, Σ k n/outgoing, Σ q, Σ q n/incoming, and the running log-sum of the competition.
Its log keeps any strength of the conserved flow safe, also without a clamp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.flow.causal_backward import flow_causal_backward
from manyheads.attention.flow.parts import (
    bounded,
    cut_tile,
    empty_outputs,
    product,
    weighted_sum,
)
from manyheads.layers.linear import cache_tiles
from manyheads.layers.precision import without_autocast

__all__ = ["flow_causal"]


def flow_causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    competition: Tensor,
    number: Tensor,
    mask: Tensor | None,
    *,
    squash: bool,
    eps: float,
    clamp: float | None,
    outer_eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs (B, H, N, V), the next state and the next competition.

    All tensors have one dtype (float32 or float64) and H heads.

    Args:
        state: (B, H, D, V + 4), see above.
        competition: (B, H).
        number: (B, N), how many real tokens there are up to each, itself included, at least 1.
        mask: (B, N), True = a real token.
        squash: queries and keys still have to go through the sigmoid; else they are mapped.
    """
    tensors = (query, key, value, state, competition)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    out, final, last, *_ = _forward_op(
        *tensors, number, mask, squash, eps, clamp, outer_eps, chunk_size, keep
    )
    return out, final, last


@torch.library.custom_op("manyheads::flow_causal", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    competition: Tensor,
    number: Tensor,
    mask: Tensor | None,
    squash: bool,
    eps: float,
    clamp: float | None,
    outer_eps: float,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return outputs, last state, last competition and, if ``keep``, what backward needs.

    That is the state before each chunk, and five numbers a token: incoming, outgoing, allocation,
    conserved source, and the log-sum of the competition.
    """
    out, final, last, states, numbers = _results(query, value, state, competition, chunk_size, keep)
    width = value.shape[-1]
    for rows, spans in cache_tiles(query, chunk_size):
        carried, log_sum = final[rows], last[rows]
        memory, key_sum, key_flow, query_sum, query_flow = _columns(carried, width)
        for span in spans:
            q, k, v, n, real, _ = cut_tile(
                (query, key, value), number, mask, rows, span, chunk_size=chunk_size, squash=squash
            )
            scores = q @ k.mT
            lower, upper = scores.tril(), scores.triu_()
            q_total, k_total = q.sum(-1), k.sum(-1)  # over D, for the terms with eps
            before = k.new_empty(*k.shape[:3], k.shape[-1], width + 4)
            columns = _columns(before, width)

            flow = _before(k.sum(-2), key_sum, columns[1])
            incoming = product(q, flow, eps, outer_eps).add_(lower.sum(-1))
            incoming.add_(k_total.cumsum(-1), alpha=eps)
            flow = _before(q.sum(-2), query_sum, columns[3])
            outgoing = product(k, flow, eps, outer_eps).add_(upper.sum(-2))
            outgoing.add_(q_total.cumsum(-1), alpha=eps)
            if real is not None:
                incoming.masked_fill_(~real, 1)
                outgoing.masked_fill_(~real, 1)

            r, s = n / outgoing, n / incoming
            flow = _before(weighted_sum(r, k), key_flow, columns[2])
            allocation = product(q, flow, eps, outer_eps).add_(weighted_sum(r, lower.mT))
            allocation.add_((r * k_total).cumsum(-1), alpha=eps).div_(n).sigmoid_()
            flow = _before(weighted_sum(s, q), query_flow, columns[4])
            conserved = product(k, flow, eps, outer_eps).add_(weighted_sum(s, upper))
            conserved.add_((s * q_total).cumsum(-1), alpha=eps).div_(n)

            force = bounded(conserved, clamp, real)
            sums = torch.logaddexp(force.flatten(2).logcumsumexp(-1), log_sum[..., None])
            log_sum.copy_(sums[..., -1])
            sums = sums.view_as(force)
            strength = (force - sums).exp_().mul_(n)
            if real is not None:
                strength *= real
            weighted = v * strength[..., None]
            added = k.mT @ weighted  # (B, H, n, D, V)
            for i in range(added.shape[2]):
                columns[0][:, :, i] = memory
                memory += added[:, :, i]
            o = (lower @ weighted).add_(q @ columns[0])
            o *= (allocation / incoming)[..., None]

            start, stop = span
            out[rows, :, start:stop] = o.flatten(2, 3)[:, :, : stop - start]
            if keep:
                first = start // chunk_size
                states[rows, :, first : first + before.shape[2]] = before
                for i, t in enumerate((incoming, outgoing, allocation, conserved, sums)):
                    numbers[i, rows, :, start:stop] = t.flatten(2)[:, :, : stop - start]
    return out, final, last, states, numbers


@_forward_op.register_fake
def _(query, key, value, state, competition, *rest):  # type: ignore[no-untyped-def]
    return _results(query, value, state, competition, *rest[-2:])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, _, competition, number, mask, *options = inputs
    ctx.squash, ctx.eps, ctx.clamp, _, ctx.chunk_size, _ = options
    out, _, last, states, numbers = output
    ctx.mark_non_differentiable(states, numbers)
    ctx.set_materialize_grads(False)  # a gradient of zeros for the states would be as large
    ctx.save_for_backward(query, key, value, number, mask, competition, out, last, states, numbers)


def _backward(ctx, grad_out, grad_final, grad_last, *_):  # type: ignore[no-untyped-def]
    options = (ctx.squash, ctx.eps, ctx.clamp, ctx.chunk_size)
    query, _, value, *_, last, _, _ = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(value)
    if grad_final is None:
        grad_final = query.new_zeros(*last.shape, query.shape[-1], value.shape[-1] + 4)
    if grad_last is None:
        grad_last = torch.zeros_like(last)
    grads = flow_causal_backward(*ctx.saved_tensors, grad_out, grad_final, grad_last, *options)
    return (*grads, *(None for _ in range(8)))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _results(
    query: Tensor, value: Tensor, state: Tensor, competition: Tensor, chunk_size: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    chunks = -(-length // chunk_size) if keep else 0
    return (
        empty_outputs(query, value),
        state.clone(),
        competition.clone(),
        query.new_empty(batch, heads, chunks, dim, value.shape[-1] + 4),
        query.new_empty(5, batch, heads, length if keep else 0),
    )


def _columns(state: Tensor, width: int) -> tuple[Tensor, ...]:
    """Return views of the memory and of the four sums."""
    return (state[..., :width], *(state[..., width + i] for i in range(4)))


def _before(sums: Tensor, carry: Tensor, place: Tensor) -> Tensor:
    """Turn sums of chunks (B, H, n, D) into those before each, from ``carry``, which moves on."""
    ends = sums.cumsum(2).add_(carry[:, :, None])
    starts = torch.cat((carry[:, :, None], ends[:, :, :-1]), 2)
    carry.copy_(ends[:, :, -1])
    place.copy_(starts)
    return starts
