"""Flow attention between all sinks and all sources: O(N D V), few passes, closed-form backward.

B batch, H heads, L sinks (queries), M sources (keys), D key dim, V value dim.

The whole network is one operator: everything of length L or M is either an input, an output or
one number a token. Heads are worked through a few at a time, so that the passes over one of them
find it in the processor's cache. Sums over d of (q + eps)(s + eps) are q·(s + eps) plus
eps Σ(s + eps).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.attention.flow.parts import dot, empty_outputs, product, weighted_sum
from manyheads.layers.precision import without_autocast

__all__ = ["flow_bidirectional"]

_TILE_NUMBERS = 1 << 18  # numbers in the queries of one tile: 1 MiB in float32


def flow_bidirectional(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    mask: Tensor | None,
    *,
    squash: bool,
    eps: float,
    clamp: float | None,
    outer_eps: float,
) -> Tensor:
    """Return (B, H, L, V) from tensors of one dtype (float32 or float64) and H heads.

    ``squash``: queries and keys still have to go through the sigmoid; else they are mapped.
    """
    return _forward_op(
        query, key, value, query_mask, mask, squash, eps, clamp, outer_eps
    )[0]  # fmt: skip


@torch.library.custom_op("manyheads::flow_bidirectional", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    mask: Tensor | None,
    squash: bool,
    eps: float,
    clamp: float | None,
    outer_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs and what backward needs.

    ``sinks`` (2, B, H, L): incoming, allocation. ``sources`` (3, B, H, M): outgoing, conserved
    source, competition. ``totals`` (B, H, D, V + 4): the memory Σ k (c v)ᵀ and the columns Σ k,
    Σ q, Σ k/outgoing, Σ q/incoming.
    """
    (batch, heads, length, dim), width = query.shape, value.shape[-1]
    out = empty_outputs(query, value)
    sinks = query.new_empty(2, batch, heads, length)
    sources = query.new_empty(3, batch, heads, key.shape[2])
    totals = query.new_empty(batch, heads, dim, width + 4)
    for part in _tiles(query, key):
        q, q_real = _mapped(query, query_mask, part, squash)
        k, k_real = _mapped(key, mask, part, squash)
        key_sum, query_sum = k.sum(-2), q.sum(-2)  # (B, H, D)
        incoming = product(q, key_sum, eps, outer_eps)
        outgoing = product(k, query_sum, eps, outer_eps)
        if q_real is not None:
            incoming.masked_fill_(q_real == 0, 1)
        if k_real is not None:
            outgoing.masked_fill_(k_real == 0, 1)
        key_flow = weighted_sum(outgoing.reciprocal(), k)
        query_flow = weighted_sum(incoming.reciprocal(), q)
        conserved = product(k, query_flow, eps, outer_eps)
        force = conserved if clamp is None else conserved.clamp(-clamp, clamp)
        if k_real is None:
            count: Tensor | int = key.shape[2]
            competition = force.softmax(-1).mul_(count)
        else:
            count = k_real.sum(-1, keepdim=True)
            force = force.masked_fill(k_real == 0, torch.finfo(force.dtype).min)
            competition = force.softmax(-1).mul_(count * k_real)
        allocation = product(q, key_flow, eps, outer_eps)
        allocation = allocation.mul_(_ratio(q, q_real, count)).sigmoid_()
        memory = k.mT @ (value[part] * competition[..., None])
        torch.mul(q @ memory, (allocation / incoming)[..., None], out=out[part])
        for i, t in enumerate((incoming, allocation)):
            sinks[i][part] = t
        for i, t in enumerate((outgoing, conserved, competition)):
            sources[i][part] = t
        sums = torch.stack((key_sum, query_sum, key_flow, query_flow), -1)
        totals[part] = torch.cat((memory, sums), -1)
    return out, sinks, sources, totals


@_forward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    (batch, heads, length, dim), width = query.shape, value.shape[-1]
    return (
        empty_outputs(query, value),
        query.new_empty(2, batch, heads, length),
        query.new_empty(3, batch, heads, key.shape[2]),
        query.new_empty(batch, heads, dim, width + 4),
    )


@torch.library.custom_op("manyheads::flow_bidirectional_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_mask: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    sinks: Tensor,
    sources: Tensor,
    totals: Tensor,
    grad_out: Tensor,
    squash: bool,
    eps: float,
    clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go through the network against the flow; d_x is the gradient of x.

    The outer products that make up the gradients of q and k are one matrix product each: columns
    beside those of the values carry the flows.
    """
    grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
    width = value.shape[-1]
    for part in _tiles(query, key):
        q, q_real = _mapped(query, query_mask, part, squash)
        k, k_real = _mapped(key, mask, part, squash)
        (incoming, allocation), do, v = (t[part] for t in sinks), grad_out[part], value[part]
        outgoing, conserved, competition = (t[part] for t in sources)
        memory, sums = totals[part].split((width, 4), -1)
        key_sum, query_sum, key_flow, query_flow = sums.unbind(-1)
        count = key.shape[2] if k_real is None else k_real.sum(-1, keepdim=True)

        # Columns: gradients of the values' sums, of incoming and allocation, and two factors.
        left = q.new_empty(*q.shape[:-1], width + 4)
        g = torch.mul(do, (allocation / incoming)[..., None], out=left[..., :width])
        read = (do * out[part]).sum(-1)
        d_allocation = read * (1 - allocation) * _ratio(q, q_real, count)
        d_memory = q.mT @ g

        d_value = k @ d_memory
        d_competition = (v * d_value).sum(-1)
        torch.mul(d_value, competition[..., None], out=grad_value[part])
        pull = competition * d_competition
        if k_real is None:
            mean = pull.mean(-1, keepdim=True)
        else:
            mean = pull.sum(-1, keepdim=True) / torch.as_tensor(count).clamp_min(1)
        d_conserved = pull - competition * mean
        if clamp is not None:
            d_conserved = d_conserved * (conserved.abs() <= clamp)

        d_key_flow = weighted_sum(d_allocation, q, eps)
        d_query_flow = weighted_sum(d_conserved, k, eps)
        d_incoming = -read / incoming - dot(q, d_query_flow) / incoming.square()
        d_outgoing = -dot(k, d_key_flow) / outgoing.square()
        d_key_sum = weighted_sum(d_incoming, q, eps)
        d_query_sum = weighted_sum(d_outgoing, k, eps)

        for i, column in enumerate((d_incoming, d_allocation, incoming.reciprocal())):
            left[..., width + i] = column
        left[..., width + 3] = 1
        rows = (key_sum + eps, key_flow + eps, d_query_flow, d_query_sum)
        d_q = left @ torch.cat((memory, torch.stack(rows, -1)), -1).mT
        if left.shape[2] != k.shape[2]:
            left = k.new_empty(*k.shape[:-1], width + 4)
        torch.mul(v, competition[..., None], out=left[..., :width])
        for i, column in enumerate((d_outgoing, d_conserved, outgoing.reciprocal())):
            left[..., width + i] = column
        left[..., width + 3] = 1
        rows = (query_sum + eps, query_flow + eps, d_key_flow, d_key_sum)
        d_k = left @ torch.cat((d_memory, torch.stack(rows, -1)), -1).mT
        _unmap(d_q, q, q_real, squash, grad_query[part])
        _unmap(d_k, k, k_real, squash, grad_key[part])
    return grad_query, grad_key, grad_value


@_backward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.squash, ctx.eps, ctx.clamp, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # only the outputs have one
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_out, *_):  # type: ignore[no-untyped-def]
    if grad_out is None:
        return (None,) * 9
    grads = _backward_op(*ctx.saved_tensors, grad_out, ctx.squash, ctx.eps, ctx.clamp)
    return (*grads, None, None, None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _tiles(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield parts of batch and heads that fit the cache."""
    batch, heads, _, dim = query.shape
    count = max(1, _TILE_NUMBERS // max(1, max(query.shape[2], key.shape[2]) * dim))
    rows, columns = max(1, count // heads), min(count, heads)
    for b in range(0, batch, rows):
        for h in range(0, heads, columns):
            yield slice(b, b + rows), slice(h, h + columns)


def _mapped(
    x: Tensor, mask: Tensor | None, part: tuple[slice, slice], squash: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the mapped tokens of a tile, 0 at padding, and 1 at real tokens (B, 1, N)."""
    x = x[part]
    x = torch.sigmoid(x, out=x.new_empty(x.shape)) if squash else x.contiguous()
    if mask is None:
        return x, None
    real = mask[part[0], None].to(x)
    return x * real[..., None], real


def _unmap(grad: Tensor, x: Tensor, real: Tensor | None, squash: bool, out: Tensor) -> None:
    if real is not None:
        grad *= real[..., None]
    if squash:
        torch.ops.aten.sigmoid_backward.grad_input(grad, x, grad_input=out)
    else:
        out.copy_(grad)


def _ratio(q: Tensor, q_real: Tensor | None, count: Tensor | int) -> Tensor | float:
    """Return sinks per source of each row."""
    sinks = q.shape[2] if q_real is None else q_real.sum(-1, keepdim=True)
    return sinks / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
