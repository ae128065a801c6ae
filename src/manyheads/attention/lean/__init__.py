"""Lean attention: softmax attention of few queries to long caches, dealt evenly to workers.

softmax(scale · q Kᵀ) V of (B, H, L, D) queries, L small, to caches (B, H_kv, N, D) of different
lengths. Heads alone leave most workers idle while one token is decoded, and cutting all contexts
alike (FlashDecoding) leaves a last wave that is not full. Here the tiles of all contexts stand in
one line that is dealt in equal pieces, and partial results (m, l, o) = (max s, Σ e^(s-m),
Σ e^(s-m) v), of unequal sizes, are merged by an associative operator. Sanovar et al., 2405.10480.

Exact: softmax attention and its key-value cache, computed in another order. Time
O(L · sum of lengths · D) over all workers; keys and values are read once for all query heads of
a key-value head; scores of a few thousand keys exist at a time. Training and whole prompts leave
nothing to deal and go to torch's scaled_dot_product_attention. Numerics: partial results in
float32 at least, results equal up to rounding for any number of workers, no key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.lean.caches import lean_packed, lean_paged, lean_partials
from manyheads.attention.lean.definition import lean_reference, lean_weights
from manyheads.attention.lean.merge import (
    Partial,
    empty_partial,
    merge_partials,
    partial_attention,
)
from manyheads.attention.lean.module import LeanAttention, LeanConfig
from manyheads.attention.lean.op import lean
from manyheads.attention.lean.plan import Plan, Segment, plan
from manyheads.attention.lean.schedule import (
    Schedule,
    aiter_schedule,
    flash_splits,
    onnxruntime_schedule,
    tile_keys,
)
from manyheads.attention.lean.simulate import Device, Simulation, simulate
from manyheads.attention.lean.streaming import lean_step, lean_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "Device",
    "LeanAttention",
    "LeanConfig",
    "Partial",
    "Plan",
    "Schedule",
    "Segment",
    "Simulation",
    "aiter_schedule",
    "empty_partial",
    "flash_splits",
    "lean",
    "lean_packed",
    "lean_paged",
    "lean_partials",
    "lean_reference",
    "lean_step",
    "lean_update",
    "lean_weights",
    "merge_partials",
    "onnxruntime_schedule",
    "partial_attention",
    "plan",
    "simulate",
    "tile_keys",
]


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
    }


def _flops(s: Shape) -> int:
    pairs = s.length * (s.length + 1) // 2 if s.is_causal else s.length * s.length
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.dv)


register_mechanism(
    Mechanism(
        name="lean",
        summary="softmax attention whose cache is decoded by equal shares of all workers",
        paper="lean",
        function=lean,
        reference=lean_reference,
        update=lean_update,
        step=lean_step,
        module=LeanAttention,
        config=LeanConfig,
        causal=True,
        bidirectional=True,
        cross=True,
        positional=True,
        exact=True,
        constant_state=False,
        cost="O(N² D), a token O(N D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.length * (s.head_dim + s.dv),
        memory_numbers=lambda s: s.batch * s.heads * s.length * (s.dv + 1),
        inputs=_inputs,
        notes=("training and prompts run as softmax does: what differs is decoding",),
    )
)
