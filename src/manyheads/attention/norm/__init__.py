"""NormAttention: linear attention whose denominator is replaced by a norm of the output.

O = SimpleRMSNorm(Q (Kᵀ V)), causal: o_t = SimpleRMSNorm(q_tᵀ Σ_{s<=t} k_s v_sᵀ), the norm over all
heads together, x / (||x|| / sqrt(H V) + eps). (B, H, N, D) queries and keys after their feature
map, (B, H, N, V) values. Qin et al., "The Devil in Linear Transformer", 2210.10340: the linear
half of TransNormer. The denominator Σ q·k of kernel attention has an unbounded gradient.

Exact evaluation of its own definition, which is not softmax attention: a layer needs training.
Causal and bidirectional. Forward 4NDV FLOPs a head, causal 2NC(D+V) more with chunks of C; the
state is D·V numbers a key head. Numerics: sums in float32 at least (in float16 they would
overflow by N = 8,192); an all-zero row gives 0, forward and backward; eps=1e-8, the published
value, bounds the gradient in name only, 1e-2 in effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.norm.definition import (
    NormState,
    norm_reference,
    norm_step,
    norm_weights,
)
from manyheads.attention.norm.module import NormAttention, NormConfig
from manyheads.attention.norm.op import norm, norm_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "NormAttention",
    "NormConfig",
    "NormState",
    "norm",
    "norm_reference",
    "norm_step",
    "norm_update",
    "norm_weights",
]

_CHUNK = 64


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
    }


def _flops(s: Shape) -> int:
    if not s.is_causal:
        return 2 * s.batch * (s.heads + s.hkv) * s.length * s.head_dim * s.dv
    size = min(_CHUNK, s.length)
    chunks = -(-s.length // size)
    chunk = 2 * size * size * (s.head_dim + s.dv) + 4 * size * s.head_dim * s.dv
    return s.batch * s.heads * chunks * chunk


def _memory_numbers(s: Shape) -> int:
    output = s.batch * s.heads * s.length * s.dv
    if not s.is_causal:
        memory = s.batch * s.heads * s.head_dim * s.dv
        return output + memory + min(1 << 18, output)
    repeated = 0 if s.hkv == s.heads else s.length * (s.head_dim + s.dv)
    tile = min(1 << 18, s.batch * s.heads * s.length * max(s.head_dim, s.dv, _CHUNK))
    return 2 * output + s.batch * s.heads * repeated + 3 * tile


register_mechanism(
    Mechanism(
        name="norm",
        summary="linear attention without a denominator, normalised over all heads instead",
        paper="transnormer",
        function=norm,
        reference=norm_reference,
        update=norm_update,
        step=norm_step,
        module=NormAttention,
        config=NormConfig,
        causal=True,
        bidirectional=True,
        positional=True,
        exact=False,
        constant_state=True,
        cost="O(N D V), causal O(N C (D+V) + N D V)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.head_dim * s.dv,
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=("the norm couples all heads: heads cannot be computed or pruned one by one",),
    )
)
