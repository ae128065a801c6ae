"""Sparse-linear attention (SLA): softmax over the few key blocks that matter, the rest linear.

O = softmax(Q K_Cᵀ / √D) V_C + Proj(φ(Q) H / φ(Q) Z). For each block of queries the key blocks
whose mean key has the largest products with its mean query are critical (C): exact softmax over
their tokens. H = Σ φ(k) vᵀ and Z = Σ φ(k) run over all keys ("main"), over those that are not
critical ("sla1"), or over those that are neither critical nor negligible ("paper"). Proj is a
learned D x D projection that starts at zero. (B, H, N, D) tensors. Zhang et al., "SLA: Beyond
Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", 2509.24006.

Approximates softmax attention, and needs fine-tuning in place of it; with topk=1 and a zero
projection it equals it. Bidirectional alone. Forward 4 n b N D FLOPs a head for the sparse part, n
critical blocks of b keys, 4 N D² for the linear part of "main" and 2 (N/b)² D for the scores of
blocks; "sla1" and "paper" hold D² numbers a block more. Nothing of N x N is made. Numerics: all in
float32 at least; rows without keys, and linear denominators that are 0, give 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.sla.blocks import BlockRule
from manyheads.attention.sla.definition import SLAWeights, sla_reference, sla_weights
from manyheads.attention.sla.module import (
    SLAAttention,
    SLAConfig,
    SparseLinearAttention,
    SparseLinearConfig,
)
from manyheads.attention.sla.op import SLAParts, sla, sla_parts
from manyheads.layers.blocks import block_count
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "SLAAttention",
    "SLAConfig",
    "SLAParts",
    "SLAWeights",
    "SparseLinearAttention",
    "SparseLinearConfig",
    "sla",
    "sla_parts",
    "sla_reference",
    "sla_weights",
]

_RULE = BlockRule(0.05, 0.0, 64, 64)  # the function's own defaults


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    weights = torch.randn(shape.dv + 1, shape.dv, generator=generator) * shape.dv**-0.5
    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
        "projection": weights[1:].clone(),
        "bias": weights[0].clone(),
    }


def _flops(s: Shape) -> int:
    blocks, size = block_count(s.length, _RULE.block_q), _RULE.block_q
    pairs = blocks * size * _RULE.critical_of(blocks) * size
    sparse = 2 * s.heads * pairs * (s.head_dim + s.dv)
    scores = 2 * s.heads * blocks * blocks * s.head_dim
    states = 2 * s.hkv * s.head_dim * s.dv * (s.length + s.dv)
    linear = 2 * s.heads * s.length * s.head_dim * (s.dv + 1)
    return s.batch * (sparse + scores + states + linear)


def _memory_numbers(s: Shape) -> int:
    blocks = block_count(s.length, _RULE.block_q)
    output = s.batch * s.heads * s.length * s.dv
    scaled = s.batch * s.heads * s.length * s.head_dim
    keys = s.batch * s.hkv * s.length * (s.head_dim + s.dv)
    gathered = _RULE.critical_of(blocks) * _RULE.block_k * (s.head_dim + s.dv + _RULE.block_q)
    maps = s.batch * s.heads * blocks * blocks
    return 2 * output + 2 * scaled + keys + gathered + (1 << 18) + 4 * maps


register_mechanism(
    Mechanism(
        name="sla",
        summary="softmax over the few key blocks that matter, linear attention for the rest",
        paper="sla",
        function=sla,
        reference=sla_reference,
        module=SLAAttention,
        config=SLAConfig,
        causal=False,
        bidirectional=True,
        cross=True,
        positional=True,
        exact=False,
        constant_state=False,
        cost="O(topk N² D + N D²)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: 0,
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=("topk=1 with a zero projection is softmax attention; below, fine-tune with it",),
    )
)
