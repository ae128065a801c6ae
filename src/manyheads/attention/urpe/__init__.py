"""URPE attention: a learned relative factor behind the softmax, beside the bias inside it.

out = (C ∘ softmax(scale · Q Kᵀ + B)) V with B_ij = b[j − i] and C_ij = c[j − i] for each head.
(B, H, N, D) tensors; tables (H, 2R − 1) or matrices (H, N, M). Luo et al., "Your Transformer May
Not be as Powerful as You Expect", 2205.13401: rows of a softmax sum to 1, so that with a bias
alone equal tokens stay equal, wherever they stand; C breaks that.

Time O(N² D) as softmax attention; memory O(N): blocks of query rows, forward and backward, and no
matrix is made of a table. The state is a key-value cache. C = 1 is softmax attention with a
relative bias exactly; other C define another function, and need training. C is never renormalised
and may be negative. Numerics: softmax in float32 at least; a query without any key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.softmax.op import SoftmaxState
from manyheads.attention.urpe.blocks import block_pairs
from manyheads.attention.urpe.definition import urpe_reference, urpe_weights
from manyheads.attention.urpe.lse import urpe_from_lse
from manyheads.attention.urpe.module import URPEAttention, URPEConfig
from manyheads.attention.urpe.op import urpe, urpe_step, urpe_update
from manyheads.attention.urpe.upgrade import add_urpe
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "SoftmaxState",
    "URPEAttention",
    "URPEConfig",
    "add_urpe",
    "urpe",
    "urpe_from_lse",
    "urpe_reference",
    "urpe_step",
    "urpe_update",
    "urpe_weights",
]


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, dim, generator=generator)

    def table() -> Tensor:
        return torch.randn(shape.heads, 2 * shape.length - 1, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.hkv, shape.head_dim),
        "value": draw(shape.hkv, shape.dv),
        "bias": table(),
        "multiplier": 1 + table() / 2,
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
        name="urpe",
        summary="softmax attention with a relative bias inside and a relative factor behind it",
        paper="urpe",
        function=urpe,
        reference=urpe_reference,
        update=urpe_update,
        step=urpe_step,
        module=URPEAttention,
        config=URPEConfig,
        causal=True,
        bidirectional=True,
        positional=True,
        exact=False,
        constant_state=False,
        cost="O(N² D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.length * (s.head_dim + s.dv),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=(
            "equals softmax attention with a relative bias while its multiplier is 1",
            "windows and graphs: hand it a matrix by (dy, dx) or by path length",
        ),
    )
)
