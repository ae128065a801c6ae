"""The gradient of attention to ragged caches, by recomputation, as an operator of torch.

Shapes as in :mod:`manyheads.attention.lean.run`. With p = e^(s - lse), o the output and g, h the
gradients of output and lse: dv = pᵀ g, ds = p (g vᵀ - g·o + h), dq = ds k, dk = dsᵀ q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.lean.native import can_run, padded_pages
from manyheads.attention.lean.plan import plan
from manyheads.attention.lean.run import (
    causal_limits,
    default_workers,
    hide,
    padded_reader,
    run_plan,
    spans,
)
from manyheads.layers.precision import without_autocast

__all__ = ["lean_op"]


def lean_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    is_causal: bool,
    workers: int,
    tile: int,
    order: str,
    query_tile: int,
    native: bool,
) -> tuple[Tensor, Tensor]:
    """Attend with gradients; arguments as of the plan, ``workers=0`` for the default number.

    The query is float32 or float64. ``native``: by the compiled kernel, where it can be had; the
    gradient is made of operators of torch.
    """
    return _op(
        query, key, value, lengths, scale, is_causal, workers, tile, order, query_tile, native
    )


@torch.library.custom_op("manyheads::lean", mutates_args=())
@without_autocast
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    is_causal: bool,
    workers: int,
    tile: int,
    order: str,
    query_tile: int,
    native: bool,
) -> tuple[Tensor, Tensor]:
    sizes = lengths.tolist()
    workers = workers or default_workers(sizes, heads=key.shape[1], tile=tile)
    dealt = plan(
        sizes, heads=key.shape[1], workers=workers, tile=tile, order=order,  # type: ignore[arg-type]
        queries=query.shape[2], query_tile=query_tile, is_causal=is_causal,
    )  # fmt: skip
    native = native and can_run(query, key, value)
    return run_plan(
        query, padded_reader(key, value), sizes, dealt, scale=scale, dim=value.shape[-1],
        pages=padded_pages(key, value) if native else None,
    )  # fmt: skip


@_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3])


@torch.library.custom_op("manyheads::lean_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    scale: float,
    is_causal: bool,
    tile: int,
    query_tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = lengths.tolist()
    dealt = plan(
        sizes, heads=key.shape[1], workers=1, tile=tile, queries=query.shape[2],
        query_tile=query_tile, is_causal=is_causal,
    )  # fmt: skip
    heads, group = dealt.heads, query.shape[1] // dealt.heads
    work = query.dtype
    dq = torch.zeros_like(query)
    dk, dv = torch.zeros_like(key, dtype=work), torch.zeros_like(value, dtype=work)
    along = (grad_out * out).sum(-1) - grad_lse
    # An empty row has lse = -inf: its scores, if it meets any, are hidden, and e^(-inf - 0) is 0.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    q, g, dq_ = (t.unflatten(1, (heads, group)) for t in (query, grad_out, dq))
    along, lse = (t.unflatten(1, (heads, group)) for t in (along, lse))
    for s in dealt.segments:
        rows = slice(s.block * query_tile, (s.block + 1) * query_tile)
        place = s.request, s.head
        q_, g_ = (t[place][:, rows].flatten(0, 1) for t in (q, g))
        along_, lse_ = (t[place][:, rows].flatten()[:, None] for t in (along, lse))
        limits = None
        if is_causal:
            limits = causal_limits(dealt, s, sizes[s.request], group, query.device)
        total = torch.zeros_like(q_)
        for a, b in spans(dealt, s, sizes[s.request], len(q_)):
            k_, v_ = (t[place][a:b].to(work) for t in (key, value))
            scores = (q_ * scale) @ k_.mT
            if limits is not None:
                hide(scores, limits, a, b)
            # A weight is at most 1; huge scores, made anew, may differ by more than that allows.
            weights = scores.sub_(lse_).clamp_max_(0).exp_()
            dv[place][a:b].addmm_(weights.mT, g_)
            slope = (g_ @ v_.mT).sub_(along_).mul_(weights).mul_(scale)
            total.addmm_(slope, k_)
            dk[place][a:b].addmm_(slope.mT, q_)
        dq_[place][:, rows] = total.unflatten(0, (group, -1))
    return dq, dk.to(key.dtype), dv.to(value.dtype)


@_backward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, lengths, ctx.scale, ctx.is_causal, _, ctx.tile, _, ctx.query_tile, _ = inputs
    ctx.save_for_backward(query, key, value, lengths, *output)


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, lengths, out, lse = ctx.saved_tensors
    dq, dk, dv = _backward_op(
        query, key, value, lengths, out, lse, grad_out, grad_lse, ctx.scale, ctx.is_causal,
        ctx.tile, ctx.query_tile,
    )  # fmt: skip
    return dq, dk, dv, *(None,) * 8


_op.register_autograd(_backward, setup_context=_context)
