"""Aggregated attention by shifts: w² passes over the map, and no window is ever copied.

Maps are held with places last. A neighbour is then the same row of numbers read a fixed distance
away; where that runs over the end of an image row the score is masked. One temporary of the size
of the map is all that the passes need, and their gradients are passes of the same kind.

B batch, h heads, N = H · W places, D head dim, L = N and a reach on either side, J = w² cells.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.aggregated.places import neighbours

__all__ = ["shifted"]

# From here on heads take turns in inference: 4 megabytes.
_MANY_SCORES = 1 << 20


def _scores(x: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Return Σ_d x[d, t] · y[d, start_j + t] of (B, h, D, N) and (B, h, D, L), (B, h, J, N)."""
    count = x.shape[3]
    out = x.new_empty(*x.shape[:2], len(starts), count)
    product = torch.empty_like(x)
    for j, start in enumerate(starts):
        torch.mul(x, y[..., start : start + count], out=product)
        torch.sum(product, 2, out=out[:, :, j])
    return out


def _mix(weights: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Return Σ_j weights[j, t] · y[d, start_j + t], (B, h, D, N)."""
    count = weights.shape[3]
    out = weights[:, :, :1] * y[..., starts[0] : starts[0] + count]
    for j, start in enumerate(starts[1:], 1):
        out.addcmul_(weights[:, :, j : j + 1], y[..., start : start + count])
    return out


def _spread(weights: Tensor, x: Tensor, starts: tuple[int, ...], length: int) -> Tensor:
    """Return the adjoint of both, (B, h, D, L): Σ_j weights[j, t] · x[d, t] at start_j + t."""
    count = x.shape[3]
    out = x.new_zeros(*x.shape[:3], length)
    for j, start in enumerate(starts):
        out[..., start : start + count].addcmul_(weights[:, :, j : j + 1], x)
    return out


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.starts = starts
        return _scores(x, y, starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        return _mix(grads[0], y, ctx.starts), _spread(grads[0], x, ctx.starts, y.shape[3]), None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(weights, y)
        ctx.starts = starts
        return _mix(weights, y, starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, y = ctx.saved_tensors
        grad = grads[0].contiguous()
        return _scores(grad, y, ctx.starts), _spread(weights, grad, ctx.starts, y.shape[3]), None


def _unit(x: Tensor) -> Tensor:
    """Return columns (B, h, D, N) of length 1. A reduction over D this way is vectorised."""
    return x * x.square().sum(2, keepdim=True).clamp_min(1e-24).rsqrt()


def _plain_scores(x: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
    """The same for tracers, which differentiate and fuse by themselves."""
    count = x.shape[3]
    return torch.stack([(x * y[..., s : s + count]).sum(2) for s in starts], 2)


def _plain_mix(weights: Tensor, y: Tensor, starts: tuple[int, ...]) -> Tensor:
    count = weights.shape[3]
    terms = [weights[:, :, j : j + 1] * y[..., s : s + count] for j, s in enumerate(starts)]
    return sum(terms[1:], terms[0])


def _one(x: Tensor | None, head: int) -> Any:
    return None if x is None else x[head : head + 1]


def shifted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    size: tuple[int, int],
    window_size: int,
    scale: Tensor | float,
    local_bias: Tensor | None,
    pooled_bias: Tensor | None,
    query_embedding: Tensor | None,
    tokens: Tensor | None,
    token_bias: Tensor | None,
    dropout: float,
) -> Tensor:
    """Return :func:`aggregated`; what is laid out with places last is not copied."""
    heads, scores = query.shape[1], query.shape[2] * (window_size**2 + pooled_key.shape[2])
    if (
        heads > 1
        and query.shape[0] * heads * scores > _MANY_SCORES
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        # One head after another: their scores never stand in memory together.
        parts = [
            shifted(
                *(t[:, h : h + 1] for t in (query, key, value, pooled_key, pooled_value)),
                size=size,
                window_size=window_size,
                scale=_one(scale, h) if isinstance(scale, Tensor) and scale.ndim == 3 else scale,
                local_bias=_one(local_bias, h),
                pooled_bias=_one(pooled_bias, h),
                query_embedding=_one(query_embedding, h),
                tokens=_one(tokens, h),
                token_bias=_one(token_bias, h),
                dropout=dropout,
            ).mT
            for h in range(heads)
        ]
        return torch.cat(parts, 1).mT
    inside, outside = neighbours(*size, window_size, device=query.device)
    half, cells = window_size // 2, window_size**2
    reach = half * size[1] + half
    starts = tuple(
        reach + dy * size[1] + dx for dy in range(-half, half + 1) for dx in range(-half, half + 1)
    )
    plain = torch.compiler.is_compiling()
    unit = _unit(query.mT)  # (B, h, D, N)
    q = unit if query_embedding is None else unit + query_embedding.mT
    q = (q * (scale * (inside.to(q.dtype) + pooled_key.shape[2]).log())).contiguous()
    k = F.pad(_unit(key.mT), (reach, reach))
    v = F.pad(value.mT, (reach, reach))

    near = _plain_scores(q, k, starts) if plain else cast(Tensor, _Scores.apply(q, k, starts))
    bias = query.new_zeros(1, cells, 1) if local_bias is None else local_bias.unsqueeze(2)
    near = near + bias.masked_fill(outside, float("-inf"))
    far = F.normalize(pooled_key, dim=-1) @ q
    if pooled_bias is not None:
        far = far + pooled_bias.mT
    weights = torch.cat((near, far), 2).softmax(2)  # (B, h, J + P, N)
    del near, far
    if dropout:
        weights = F.dropout(weights, dropout)
    out = pooled_value.mT @ weights[:, :, cells:]
    near = weights[:, :, :cells]
    if tokens is not None or token_bias is not None:
        extra = unit.new_zeros(1) if tokens is None else tokens.mT @ unit
        extra = extra if token_bias is None else extra + token_bias.mT
        near = near + extra.masked_fill(outside, 0)
    mixed = _plain_mix(near, v, starts) if plain else cast(Tensor, _Mix.apply(near, v, starts))
    return (out + mixed).mT
