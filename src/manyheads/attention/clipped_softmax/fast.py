"""Clipped softmax attention by blocks of query rows: closed-form backward, O(N) memory.

B batch, H heads, N queries, M keys, D head dim, V value dim.

Clipping needs the finished softmax, so that kernels which normalise at the end cannot do it. A
block's softmax P is computed whole, stretched and clipped in place, and multiplied with V; the
backward computes it again. With Y = clip(s P + gamma) and s = eta − gamma, inside the clip only:
dP = s · dO Vᵀ,  dS = P ∘ (dP − Σ dP ∘ P).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.urpe.blocks import Problem, largest_block
from manyheads.layers.precision import without_autocast

__all__ = ["clipped_blocked"]


def clipped_blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    gamma: float,
    eta: float,
    offset: int = 0,
) -> Tensor:
    """Return clip((eta − gamma) softmax(scale · Q Kᵀ + bias) + gamma, 0, 1) V, (B, H, N, V).

    All floating-point tensors have one dtype (float32 or float64); query, key and value have H
    heads; ``bias`` (B or 1, H or 1, N, M) gets no gradient. ``mask`` (B, M) is True at keys that
    count, ``offset`` is the place of the first query.
    """
    return _forward_op(query, key, value, bias, mask, scale, is_causal, offset, gamma, eta)


@torch.library.custom_op("manyheads::clipped_blocked", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    offset: int,
    gamma: float,
    eta: float,
) -> Tensor:
    p = Problem(query, key, value, bias, None, mask, None, scale, is_causal, offset, 0.0)
    blocks = p.blocks()
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    scratch = query.new_empty(largest_block(blocks))
    for block in blocks:
        y = p.weights(block, scratch).mul_(eta - gamma).add_(gamma).clamp_(0, 1)
        part = out[block.examples, block.heads, block.rows]
        part.copy_(torch.bmm(y.flatten(0, 1), p.keys(p.value, block)).view(part.shape))
    return out


@_forward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("manyheads::clipped_blocked_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    grad_out: Tensor,
    scale: float,
    is_causal: bool,
    offset: int,
    gamma: float,
    eta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    p = Problem(query, key, value, bias, None, mask, None, scale, is_causal, offset, 0.0)
    blocks = p.blocks()
    dq, dk, dv = (
        query.new_zeros(query.shape),
        key.new_zeros(key.shape),
        value.new_zeros(value.shape),
    )
    size = largest_block(blocks)
    scratch, other, third = query.new_empty(size), query.new_empty(size), query.new_empty(size)
    for block in blocks:
        weights = p.weights(block, scratch)
        do = p.rows(grad_out, block)
        x = other[: weights.numel()].view(weights.shape)
        torch.bmm(do, p.keys(p.value, block).mT, out=x.flatten(0, 1))
        y = third[: weights.numel()].view(weights.shape)
        torch.mul(weights, eta - gamma, out=y).add_(gamma)
        x.masked_fill_((y < 0).logical_or_(y > 1), 0).mul_(eta - gamma).mul_(weights)
        p.keys(dv, block).baddbmm_(y.clamp_(0, 1).flatten(0, 1).mT, do)
        x.addcmul_(weights, x.sum(-1, keepdim=True), value=-1)
        ds = x.flatten(0, 1)
        p.keys(dk, block).baddbmm_(ds.mT, p.rows(p.query, block), alpha=scale)
        part = dq[block.examples, block.heads, block.rows]
        part.copy_(torch.bmm(ds, p.keys(p.key, block)).mul_(scale).view(part.shape))
    return dq, dk, dv


@_backward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    grads = _backward_op(*ctx.saved_tensors, grad_out.contiguous(), *ctx.options)
    return *grads, *(None,) * 7


_forward_op.register_autograd(_backward, setup_context=_setup_context)
