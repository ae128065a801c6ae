"""Routing attention: tokens meet inside clusters of similar content (Routing Transformer).

x̂ = LN(x) without affine; dist(n, c) = −x̂_n · μ_c; inside a cluster o_i = Σ_j softmax_j(q̂_i · k̂_j
+ q̂_i · RK_{j−i}) (v_j + RV_{j−i}), j − i by rank in the cluster; a token's output is the sum over
its clusters over their number + 0.01. (B, H, N, D) queries and keys, (B, H, N, V) values,
(H, C, D) centroids. Roy et al., "Efficient Content-Based Sparse Attention with Routing
Transformers", 2003.05997. Centroids follow their members by online k-means.

Sparse, so another function than softmax attention: needs training. Two selections: "strict",
causal in every respect, and "top", balanced clusters over the whole sequence, which looks ahead.
O(N C D + N W D) with window W. The state of the strict form is C · W keys and values a head.
Numerics: logits, softmax and averages in float32 at least; a token that meets nobody gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.routing.config import RoutingConfig
from manyheads.attention.routing.definition import (
    RoutingState,
    Selection,
    routing_distances,
    routing_normalize,
    routing_reference,
    routing_select,
    routing_step,
)
from manyheads.attention.routing.fast import tile_sizes
from manyheads.attention.routing.kmeans import (
    KMeansState,
    OnlineKMeans,
    kmeans_loss,
    kmeans_sums,
    kmeans_update,
)
from manyheads.attention.routing.local import (
    LocalState,
    blocked_local,
    blocked_local_update,
)
from manyheads.attention.routing.maps import (
    SortedRouting,
    local_block_mask,
    routing_block_mask,
)
from manyheads.attention.routing.module import RoutingAttention, RoutingLayerState
from manyheads.attention.routing.op import routing
from manyheads.attention.routing.spherical import (
    SphericalKMeans,
    spherical_loss,
    spherical_routing,
)
from manyheads.attention.routing.stream import routing_init, routing_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "KMeansState",
    "LocalState",
    "OnlineKMeans",
    "RoutingAttention",
    "RoutingConfig",
    "RoutingLayerState",
    "RoutingState",
    "Selection",
    "SortedRouting",
    "SphericalKMeans",
    "blocked_local",
    "blocked_local_update",
    "kmeans_loss",
    "kmeans_sums",
    "kmeans_update",
    "local_block_mask",
    "routing",
    "routing_block_mask",
    "routing_distances",
    "routing_init",
    "routing_normalize",
    "routing_reference",
    "routing_select",
    "routing_step",
    "routing_update",
    "spherical_loss",
    "spherical_routing",
]

_CLUSTERS, _WINDOW = 8, 64


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(dim: int) -> Tensor:
        return torch.randn(shape.batch, shape.heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.head_dim),
        "key": draw(shape.head_dim),
        "value": draw(shape.dv),
        "means": torch.randn(shape.heads, _CLUSTERS, shape.head_dim, generator=generator),
    }


def _pairs(s: Shape) -> tuple[int, int, int]:
    """Tiles, queries a tile and keys a tile, for queries and keys that route separately."""
    if not s.is_causal:
        window = min(_WINDOW, s.length)
        return _CLUSTERS, window, window
    size, reach = tile_sizes(_WINDOW)
    return -(-s.length // size) + s.length // size, size, reach


def _flops(s: Shape) -> int:
    tiles, queries, keys = _pairs(s)
    assign = 4 * s.length * _CLUSTERS * s.head_dim
    return s.batch * s.heads * (assign + 2 * tiles * queries * keys * (s.head_dim + s.dv))


def _memory_numbers(s: Shape) -> int:
    """Rows of all heads and where they stand, the tiles of one head, and some scores."""
    tiles, queries, keys = _pairs(s)
    rows = s.length * (2 * s.head_dim + s.dv + 2 * _CLUSTERS)
    places = 8 * tiles * queries
    tiled = 2 * tiles * queries * (s.head_dim + s.dv)
    return s.batch * s.heads * (rows + places) + tiled + min(1 << 18, 2 * tiles * queries * keys)


register_mechanism(
    Mechanism(
        name="routing",
        summary="softmax attention inside clusters of similar tokens; gives up all other pairs",
        paper="routing",
        function=routing,
        reference=routing_reference,
        update=routing_update,
        step=routing_step,
        module=RoutingAttention,
        config=RoutingConfig,
        causal=True,
        bidirectional=True,
        positional=True,
        exact=False,
        constant_state=True,
        cost="O(N (C+W) D), C clusters of W",
        flops=_flops,
        bytes_moved=lambda s: 8 * s.batch * s.length * s.heads * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.heads * _CLUSTERS * _WINDOW * (s.head_dim + s.dv),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=(
            "with as many clusters as tokens in each, sqrt(N), a pass is O(N^1.5 D)",
            "costs are those of 8 clusters of 64 tokens, the layer's default, with queries and "
            "keys that route separately",
            "bidirectional, and causal with selection='top', later tokens decide who meets",
        ),
    )
)
