"""Softmax attention: softmax(scale · Q Kᵀ + bias) V (Vaswani et al., 1706.03762).

The exact baseline that every other mechanism is measured against. (B, H, N, D) tensors, grouped
key-value heads (2305.13245), padding, packing and a key-value cache. Time O(N M D); the state
grows by H_kv (D + V) numbers a token. Computed by torch's scaled_dot_product_attention, which
keeps no N x N matrix on a CPU. Numerics: a row without any key gives 0, not NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.softmax.definition import softmax_reference, softmax_weights
from manyheads.attention.softmax.module import SoftmaxAttention, SoftmaxConfig
from manyheads.attention.softmax.op import SoftmaxState, softmax, softmax_step, softmax_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "SoftmaxAttention",
    "SoftmaxConfig",
    "SoftmaxState",
    "softmax",
    "softmax_reference",
    "softmax_step",
    "softmax_update",
    "softmax_weights",
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
        name="softmax",
        summary="softmax attention, the exact baseline, with a key-value cache that grows",
        paper=None,
        function=softmax,
        reference=softmax_reference,
        update=softmax_update,
        step=softmax_step,
        module=SoftmaxAttention,
        config=SoftmaxConfig,
        causal=True,
        bidirectional=True,
        cross=True,
        positional=True,
        exact=True,
        constant_state=False,
        cost="O(N² D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.length * (s.head_dim + s.dv),
        memory_numbers=lambda s: s.batch * s.heads * s.length * (s.dv + 1),
        inputs=_inputs,
    )
)
