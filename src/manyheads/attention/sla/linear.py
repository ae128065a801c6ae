"""The linear branch: what the critical blocks leave out, through a feature map.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import unknown_name
from manyheads.layers.blocks import cut
from manyheads.layers.heads import repeat_kv

__all__ = ["EPS", "FEATURE_MAPS", "feature_map_of", "linear_all", "linear_marginal", "quotient"]

EPS = 1e-5  # of the main variant's denominator, as published

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


def feature_map_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return the feature map of that name, applied to queries and keys alike.

    Raises:
        ValueError: unknown name; the nearest is given.
    """
    if name not in FEATURE_MAPS:
        raise unknown_name("feature_map", name, FEATURE_MAPS)
    return FEATURE_MAPS[name]


def linear_all(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None = None) -> Tensor:
    """φ(Q) (φ(K)ᵀ V) / (1e-5 + φ(Q) · Σ φ(K)) over all keys: the branch of the main variant.

    Args:
        query, key: (B, H, N, D) and (B, H_kv, M, D) after the feature map, padding 0.
        value: (B, H_kv, M, V).
        weight: (W, V) of a projection of the result, made with the D x V state: N V W cheaper.

    Returns:
        (B, H, N, V), or (B, H, N, W) with a weight.
    """
    heads = query.shape[1]
    memory = key.mT @ value  # (B, H_kv, D, V)
    if weight is not None:
        memory = memory @ weight.mT
    total = key.sum(2)[..., None]  # (B, H_kv, D, 1)
    above = query @ repeat_kv(memory, heads)
    return above / (query @ repeat_kv(total, heads) + EPS)


def linear_marginal(
    query: Tensor, key: Tensor, value: Tensor, block_map: Tensor, block_q: int, block_k: int
) -> Tensor:
    """φ(Q) H / φ(Q) Z with H and Z of the marginal blocks alone: the paper's branch and SLA-1's.

    States of the key blocks are summed by one product with the map's zeros: P Q D V more
    multiply-adds than taking the few others from the total, but nothing cancels.

    Returns:
        (B, H, N, V); where no marginal block is left, 0.
    """
    heads = query.shape[1]
    ones = torch.ones_like(value[..., :1])
    wide = torch.cat((value, ones), -1)  # Z as one more column of H
    states = cut(key, block_k).mT @ cut(wide, block_k)  # (B, H_kv, Q, D, V + 1)
    states = repeat_kv(states.flatten(-2), heads)
    marginal = (block_map == 0).to(states.dtype)
    sums = (marginal @ states).unflatten(-1, (query.shape[-1], -1))  # (B, H, P, D, V + 1)
    out = (cut(query, block_q) @ sums).flatten(2, 3)[:, :, : query.shape[2]]
    return quotient(out[..., :-1], out[..., -1:])


def quotient(above: Tensor, below: Tensor) -> Tensor:
    """Return above / below, and 0 where nothing is below: no eps, and no NaN."""
    # Far below any weight that counts, and far enough from 0 that its reciprocal is finite.
    empty = below < torch.finfo(below.dtype).tiny ** 0.75
    return (above / below.masked_fill(empty, 1)).masked_fill(empty, 0)
