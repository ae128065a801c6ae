"""Flow attention: linear attention whose weights come from the conservation of flows.

Keys are sources, queries are sinks, φ(q)·φ(k) with φ = sigmoid are capacities. With
I_i = Σ_j φ(q_i)·φ(k_j) and O_j = Σ_i φ(q_i)·φ(k_j), each source is set to give 1 and each sink to
take 1: Î_i = φ(q_i)·Σ_j φ(k_j)/O_j, Ô_j = φ(k_j)·Σ_i φ(q_i)/I_i. Then
y_i = sigmoid(Î_i) φ(q_i)/I_i · Σ_j φ(k_j) (M softmax_j(Ô_j) v_j)ᵀ. (B, H, N, D) queries,
(B, H, M, D) keys, (B, H, M, V) values. Wu et al., "Flowformer: Linearizing Transformers with
Conservation Flows", 2202.06258.

Bidirectional, cross and causal. Exact evaluation of its own definition, which is not softmax
attention: a layer needs training. The causal form is the paper's approximation of the other one:
source j is normalised by queries up to j and its strength settled at j, which makes it a
recurrence with D (V + 4) + 1 numbers of state a head. Forward about 4NDV FLOPs a head, causal
2NC(D+V) + 4NDV with chunks of C. Faster than softmax from a few hundred tokens on. Knows no
positions. Numerics: flows, sums and states in float32 at least; zero keys, huge scores and
all-masked rows are safe with eps > 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.flow.definition import (
    Flows,
    FlowState,
    flow_flows,
    flow_reference,
    flow_step,
    flow_weights,
)
from manyheads.attention.flow.module import FlowAttention, FlowConfig
from manyheads.attention.flow.op import empty_flow_state, flow, flow_update
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "FlowAttention",
    "FlowConfig",
    "FlowState",
    "Flows",
    "empty_flow_state",
    "flow",
    "flow_flows",
    "flow_reference",
    "flow_step",
    "flow_update",
    "flow_weights",
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
    dim, width = s.head_dim, s.dv
    if not s.is_causal:
        return s.batch * s.heads * s.length * (4 * dim * width + 4 * dim)
    size = min(_CHUNK, s.length)
    chunk = 2 * size * size * (dim + width) + 4 * size * dim * width + 4 * size * (dim + size)
    return s.batch * s.heads * -(-s.length // size) * chunk


def _memory_numbers(s: Shape) -> int:
    outputs = s.batch * s.heads * s.length * s.dv
    repeated = 0 if s.hkv == s.heads else s.batch * s.heads * s.length * (s.head_dim + s.dv)
    sums = s.batch * s.heads * s.head_dim * (s.dv + 4)
    if not s.is_causal:
        tile = max(1 << 18, s.length * s.head_dim)
        return outputs + repeated + sums + 5 * s.batch * s.heads * s.length + 6 * tile
    chunks = -(-s.length // _CHUNK)
    return outputs + repeated + (chunks + 2) * sums + 10 * (1 << 18)


register_mechanism(
    Mechanism(
        name="flow",
        summary="linear attention with competing sources and limited sinks; no N x N matrix",
        paper="flowformer",
        function=flow,
        reference=flow_reference,
        update=flow_update,
        step=flow_step,
        module=FlowAttention,
        config=FlowConfig,
        causal=True,
        bidirectional=True,
        cross=True,
        positional=False,
        exact=False,
        constant_state=True,
        cost="O(N D V), causal O(N C (D+V) + N D V)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.heads * (s.head_dim * (s.dv + 4) + 1),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=("the causal form is an approximation of the bidirectional one, not its mask",),
    )
)
