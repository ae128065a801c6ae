"""Gated linear attention (GLA): a matrix state with a data-dependent forget gate.

S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ,  o_t = scale · q_tᵀ S_t,  with g_t <= 0 for each key
channel. (B, H, N, D) queries, keys and log decays; (B, H, N, V) values. Yang et al., "Gated
Linear Attention Transformers with Hardware-Efficient Training", 2312.06635.

Causal only. Exact evaluation of its own definition, which is not softmax attention: a layer
needs training. Forward 2NC(D+V) + 4NDV FLOPs a head with chunks of C, a step 4DV; the state is
D·V numbers, whatever the context. Below about a thousand tokens softmax is as fast or faster.
Numerics: decays and states in float32 at least; log decays of any finite strength are safe
(use ``cu_seqlens`` to separate documents, not a decay of -inf).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.gla.definition import (
    GLAState,
    gla_reference,
    gla_step,
    gla_weights,
)
from manyheads.attention.gla.fast import SEGMENT_NUMBERS
from manyheads.attention.gla.module import GatedLinearAttention, GLAConfig
from manyheads.attention.gla.op import gla, gla_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "GLAConfig",
    "GLAState",
    "GatedLinearAttention",
    "gla",
    "gla_reference",
    "gla_step",
    "gla_update",
    "gla_weights",
]

_CHUNK = 64


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
        "log_decay": torch.nn.functional.logsigmoid(draw(shape.hkv, shape.head_dim)) / 16,
    }


def _flops(s: Shape) -> int:
    chunks = -(-s.length // _CHUNK)
    chunk = 2 * _CHUNK * _CHUNK * (s.head_dim + s.dv) + 4 * _CHUNK * s.head_dim * s.dv
    return s.batch * s.heads * chunks * chunk


def _memory(s: Shape) -> int:
    """Outputs, one memory a chunk, and the temporaries of a segment."""
    rows, chunks = s.batch * s.heads, -(-s.length // _CHUNK)
    segment = min(chunks * _CHUNK, max(_CHUNK, SEGMENT_NUMBERS // (rows * s.head_dim)))
    temporaries = 4 * s.head_dim + _CHUNK + -(-s.head_dim * s.dv // _CHUNK)
    if s.length % _CHUNK:
        temporaries += 3 * s.head_dim + s.dv
    kept = s.length * s.dv + chunks * s.head_dim * s.dv
    return rows * (kept + segment * temporaries)


register_mechanism(
    Mechanism(
        name="gla",
        summary="linear attention whose matrix state forgets by a data-dependent gate",
        paper="gla",
        function=gla,
        reference=gla_reference,
        update=gla_update,
        step=gla_step,
        module=GatedLinearAttention,
        config=GLAConfig,
        causal=True,
        bidirectional=False,
        positional=True,
        exact=False,
        constant_state=True,
        cost="O(N C (D+V) + N D V)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.heads * s.length * (3 * s.head_dim + 2 * s.dv),
        state_numbers=lambda s: s.batch * s.heads * s.head_dim * s.dv,
        memory_numbers=_memory,
        inputs=_inputs,
        notes=("slower than softmax on short sequences (below about 1,000 tokens)",),
    )
)
