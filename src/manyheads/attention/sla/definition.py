"""Sparse-linear attention by its definition, through N x M matrices.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.sla.linear import EPS, feature_map_of, quotient
from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = ["SLAWeights", "sla_reference", "sla_weights"]


class SLAWeights(NamedTuple):
    """``sparse`` and ``linear`` (B, H, N, M): weights of the branches; ``block_map``."""

    sparse: Tensor
    linear: Tensor
    block_map: Tensor


def _block_map(
    query: Tensor, key: Tensor, topk: float, negligible: float, block_q: int, block_k: int
) -> Tensor:
    pooled_q, pooled_k = (
        torch.stack([part.mean(2) for part in x.detach().split(block, 2)], 2)
        for x, block in ((query, block_q), (key, block_k))
    )
    scores = pooled_q @ pooled_k.mT
    blocks = scores.shape[-1]
    most = max(1, min(blocks, int(topk * blocks)))
    least = min(blocks - most, int(negligible * blocks))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kind = torch.zeros(blocks, dtype=torch.int8, device=key.device)
    kind[:most] = 1
    kind[blocks - least :] = -1
    return torch.zeros_like(order, dtype=torch.int8).scatter(-1, order, kind.expand(order.shape))


def sla_weights(
    query: Tensor,
    key: Tensor,
    *,
    topk: float = 0.05,
    negligible: float = 0.1,
    block_q: int = 64,
    block_k: int = 64,
    feature_map: str = "softmax",
    variant: str = "main",
    scale: float | None = None,
) -> SLAWeights:
    """Return the attention matrices of both branches: o_sparse = sparse @ v, o_linear = linear @ v.

    Arguments as :func:`manyheads.attention.sla`. O(N M) in memory: for looking at short sequences.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key = repeat_kv(key, query.shape[1])
    negligible = negligible if variant == "paper" else 0.0
    block_map = _block_map(query, key, topk, negligible, block_q, block_k)
    tokens = block_map.repeat_interleave(block_q, 2)[:, :, : query.shape[2]]
    tokens = tokens.repeat_interleave(block_k, 3)[..., : key.shape[2]]  # (B, H, N, M)
    scores = (query @ key.mT * scale).masked_fill(tokens != 1, -torch.inf)
    phi = feature_map_of(feature_map)
    linear = phi(query) @ phi(key).mT
    if variant == "main":
        linear = linear / (linear.sum(-1, keepdim=True) + EPS)
    else:
        linear = linear * (tokens == 0)
        linear = quotient(linear, linear.sum(-1, keepdim=True))
    return SLAWeights(scores.softmax(-1), linear, block_map)


def sla_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Sparse @ V + (linear @ V) projectionᵀ + bias through N x M matrices: the oracle of the tests.

    ``options`` are those of :func:`sla_weights`. With a mask, of queries and keys alike, each row
    is computed from its real tokens alone.
    """
    check_qkv(query, key, value)
    if mask is not None:
        outs = []
        for q, k, v, real in zip(query, key, value, mask, strict=True):
            out = q.new_zeros(*q.shape[:2], value.shape[-1])
            if real.any():
                a, b, c = (t[None, :, real] for t in (q, k, v))
                out[:, real] = sla_reference(a, b, c, projection, bias, **options)[0]
            outs.append(out)
        return torch.stack(outs)
    weights = sla_weights(query, key, **options)
    value = repeat_kv(value, query.shape[1])
    out = weights.sparse @ value
    if projection is not None:
        out = out + weights.linear @ value @ projection.mT
    return out if bias is None else out + bias
