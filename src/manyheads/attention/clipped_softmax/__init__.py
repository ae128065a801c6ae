"""Clipped softmax attention: weights that reach 0 without huge scores.

out = clip((eta − gamma) softmax(scale · Q Kᵀ) + gamma, 0, 1) V with gamma <= 0 and eta >= 1.
(B, H, N, D) tensors. Bondarenko et al., "Quantizable Transformers: Removing Outliers by Helping
Attention Heads Do Nothing", 2306.12929.

A head that has nothing to add must drive scores far apart before a softmax nears 0; the outliers
that this trains into activations break 8-bit quantisation. Stretching and clipping takes that
incentive away. Time O(N² D) as softmax attention; memory O(N): blocks of query rows, forward and
backward. The state is a key-value cache. Rows do not sum to 1; what is clipped gets no gradient;
gamma is a constant of the training length. gamma = 0 with eta = 1 is softmax attention exactly;
others define another function, and need training. Numerics: softmax in float32 at least; a query
without any key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.clipped_softmax.definition import (
    clip_softmax,
    clipped_softmax_reference,
    clipped_softmax_weights,
)
from manyheads.attention.clipped_softmax.module import (
    ClippedSoftmaxAttention,
    ClippedSoftmaxConfig,
)
from manyheads.attention.clipped_softmax.op import (
    clipped_softmax,
    clipped_softmax_step,
    clipped_softmax_update,
)
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.attention.urpe.blocks import block_pairs
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "ClippedSoftmaxAttention",
    "ClippedSoftmaxConfig",
    "SoftmaxState",
    "clip_softmax",
    "clipped_softmax",
    "clipped_softmax_reference",
    "clipped_softmax_step",
    "clipped_softmax_update",
    "clipped_softmax_weights",
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
    pairs, _ = block_pairs(s.batch, s.heads, s.length, is_causal=s.is_causal)
    return 2 * pairs * (s.head_dim + s.dv)


def _memory_numbers(s: Shape) -> int:
    _, block = block_pairs(s.batch, s.heads, s.length, is_causal=s.is_causal)
    rows = block // max(s.length, 1)
    return block + 3 * rows * s.head_dim + s.batch * s.heads * s.length * s.dv


register_mechanism(
    Mechanism(
        name="clipped_softmax",
        summary="softmax attention whose weights are stretched and clipped, so that 0 is reached",
        paper="quantizable",
        function=clipped_softmax,
        reference=clipped_softmax_reference,
        update=clipped_softmax_update,
        step=clipped_softmax_step,
        module=ClippedSoftmaxAttention,
        config=ClippedSoftmaxConfig,
        causal=True,
        bidirectional=True,
        cross=True,
        positional=True,
        exact=False,
        constant_state=False,
        cost="O(N² D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.length * (s.head_dim + s.dv),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=("equals softmax attention at gamma 0 and eta 1",),
    )
)
