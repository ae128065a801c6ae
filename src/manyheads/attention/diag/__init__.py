"""DiagAttention: attention inside blocks of tokens that do not overlap.

O = softmax(scale · Q Kᵀ) V or relu(scale · Q Kᵀ) V in each block of C tokens, nothing between
blocks. (B, H, N, D) tensors. Qin et al., "The Devil in Linear Transformer", 2210.10340: the local
half of TransNormer, against the dilution of attention over far tokens.

Local: exact inside a block, blind outside; a model needs other layers to look further. Causal and
bidirectional. Forward 2NC(D+V) FLOPs a head; the state is the current block alone, at most
C (D + V) numbers a key head. Numerics: scores in float32 at least; a row without a key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.diag.definition import diag_reference, diag_weights
from manyheads.attention.diag.module import DiagAttention, DiagConfig
from manyheads.attention.diag.op import DiagState, diag, diag_step, diag_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "DiagAttention",
    "DiagConfig",
    "DiagState",
    "diag",
    "diag_reference",
    "diag_step",
    "diag_update",
    "diag_weights",
]

_BLOCK = 64


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
    }


def _flops(s: Shape) -> int:
    block = min(_BLOCK, s.length)
    blocks = -(-s.length // block)
    return 2 * s.batch * s.heads * blocks * block * block * (s.head_dim + s.dv)


def _memory_numbers(s: Shape) -> int:
    block = min(_BLOCK, s.length)
    segment = min(1 << 18, s.batch * s.heads * -(-s.length // block) * block * block)
    repeated = 0 if s.hkv == s.heads else s.length * (s.head_dim + s.dv)
    return s.batch * s.heads * (s.length * s.dv + repeated) + 3 * segment


register_mechanism(
    Mechanism(
        name="diag",
        summary="attention inside blocks that do not overlap; blind between them",
        paper="transnormer",
        function=diag,
        reference=diag_reference,
        update=diag_update,
        step=diag_step,
        module=DiagAttention,
        config=DiagConfig,
        causal=True,
        bidirectional=True,
        positional=True,
        exact=False,
        constant_state=True,
        cost="O(N C D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * _BLOCK * (s.head_dim + s.dv),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=("a token sees its own block of 64 alone: combine it with a mechanism that sees on",),
    )
)
