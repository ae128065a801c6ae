"""Gated attention: each head is multiplied by a gate that looks at the layer's input.

out = sigmoid(G(x)) ∘ (softmax(scale · Q Kᵀ) V), one gate a head and token, before the heads are
joined. (B, H, N, D) tensors; logits (B, H, N, 1). Bondarenko et al., "Quantizable Transformers:
Removing Outliers by Helping Attention Heads Do Nothing", 2306.12929.

A head that has nothing to add closes its gate; without one it must drive scores far apart, and
the outliers that this trains into activations break 8-bit quantisation. Time O(N² D) as softmax
attention, through torch's fused kernel, with O(N D) for the gates. The state is a key-value cache.
Another function than softmax attention: needs training. "per_head" gates average over all tokens
and look ahead. Numerics: a query without any key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.gated.definition import gated_reference
from manyheads.attention.gated.gate import HeadGate
from manyheads.attention.gated.module import GatedAttention, GatedConfig
from manyheads.attention.gated.op import gated, gated_step, gated_update
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "GatedAttention",
    "GatedConfig",
    "HeadGate",
    "SoftmaxState",
    "gated",
    "gated_reference",
    "gated_step",
    "gated_update",
]


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
        "gate": draw(shape.heads, 1),
    }


def _flops(s: Shape) -> int:
    pairs = s.length * (s.length + 1) // 2 if s.is_causal else s.length * s.length
    return 2 * s.batch * s.heads * pairs * (s.head_dim + s.dv)


register_mechanism(
    Mechanism(
        name="gated",
        summary="softmax attention whose heads are multiplied by gates of the layer's input",
        paper="quantizable",
        function=gated,
        reference=gated_reference,
        update=gated_update,
        step=gated_step,
        module=GatedAttention,
        config=GatedConfig,
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
        memory_numbers=lambda s: 2 * s.batch * s.heads * s.length * (s.dv + 1),
        inputs=_inputs,
        notes=("gates that average over tokens (gate='per_head') are for bidirectional layers",),
    )
)
