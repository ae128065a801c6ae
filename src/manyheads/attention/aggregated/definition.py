"""Aggregated attention: a window around each query and a pooled view of the map, one softmax.

    q̂ = q / |q|, k̂ = k / |k|, Q_t = (q̂_t + QE) · scale · log(len_t)
    A_t = softmax[ Q_t · k̂_{t+j} + B_j for j in the window,  Q_t · k̂'_p + bias_{t,p} for pooled p ]
    y_t = Σ_j (A_{t,j} + q̂_t · T_j + b_j) v_{t+j} + Σ_p A_{t,p} v'_p

Window cells outside of the map have score −∞ and value 0; len_t counts the others and all pooled
keys. T and b act as further keys, behind the softmax. Shi, "TransNeXt: Robust Foveal Visual
Perception for Vision Transformers" (2311.17132). Without QE, T and b it is the paper's
pixel-focused attention. O(N (w² + P) C).

B batch, h heads, H and W rows and columns, N = H · W, D head dim, w window, P pooled keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.aggregated.places import neighbours

__all__ = ["aggregated_reference", "aggregated_weights"]


def _unfold(x: Tensor, size: tuple[int, int], window: int) -> Tensor:
    """Return the window around each place of (B, h, N, D), zeros outside, (B, h, N, D, w²)."""
    heads, dim = x.shape[1], x.shape[3]
    cells = F.unfold(x.mT.reshape(-1, heads * dim, *size), window, padding=window // 2)
    return cells.view(-1, heads, dim, window * window, x.shape[2]).permute(0, 1, 4, 2, 3)


def aggregated_weights(
    query: Tensor,
    key: Tensor,
    pooled_key: Tensor,
    *,
    size: tuple[int, int],
    window_size: int = 3,
    scale: Tensor | float = 1.0,
    local_bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    query_embedding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the softmax weights of window cells, (B, h, N, w²), and of pooled keys, (B, h, N, P).

    They sum to 1 together. Arguments as in :func:`aggregated`; differentiable, and not fast.
    """
    inside, outside = neighbours(*size, window_size, device=query.device)
    length = (inside.to(query.dtype) + pooled_key.shape[2]).log()[:, None]
    query = F.normalize(query, dim=-1)
    if query_embedding is not None:
        query = query + query_embedding
    query = query * scale * length
    windows = _unfold(F.normalize(key, dim=-1), size, window_size)
    local = (query.unsqueeze(-2) @ windows).squeeze(-2)
    pooled = query @ F.normalize(pooled_key, dim=-1).mT
    if local_bias is not None:
        local = local + local_bias.unsqueeze(1)
    if pooled_bias is not None:
        pooled = pooled + pooled_bias
    local = local.masked_fill(outside.mT, float("-inf"))
    weights = torch.cat((local, pooled), -1).softmax(-1)
    near, far = weights.split([local.shape[-1], pooled.shape[-1]], -1)
    return near, far


def aggregated_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    *,
    size: tuple[int, int],
    window_size: int = 3,
    scale: Tensor | float = 1.0,
    local_bias: Tensor | None = None,
    pooled_bias: Tensor | None = None,
    query_embedding: Tensor | None = None,
    tokens: Tensor | None = None,
    token_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return the definition's outputs, with unfolded keys and values: 2 w² copies of the map.

    Arguments and result as in :func:`aggregated`.
    """
    near, far = aggregated_weights(
        query,
        key,
        pooled_key,
        size=size,
        window_size=window_size,
        scale=scale,
        local_bias=local_bias,
        pooled_bias=pooled_bias,
        query_embedding=query_embedding,
    )
    if dropout:
        both = F.dropout(torch.cat((near, far), -1), dropout)
        near, far = both.split([near.shape[-1], far.shape[-1]], -1)
    if tokens is not None:
        near = near + F.normalize(query, dim=-1) @ tokens
    if token_bias is not None:
        near = near + token_bias
    windows = _unfold(value, size, window_size)
    return (near.unsqueeze(-2) @ windows.mT).squeeze(-2) + far @ pooled_value
