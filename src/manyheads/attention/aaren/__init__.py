"""Aaren: softmax attention of one fixed query over every prefix (Feng et al., 2405.13956).

o_k = Σ_{i<=k} e^{s_i} v_i / Σ_{i<=k} e^{s_i} with s_i = scale · q·k_i and one query q a head, for
all tokens. (B, H, N, D) keys, (B, H, N, V) values, (H, D) queries. "Attention as an RNN": what a
set of tokens leaves behind is its largest score m, the sum u and the weighted sum w, H (V + 2)
numbers whatever the context, and two such states merge by one associative operator.

Causal only. Exact evaluation of its own definition: row k equals softmax attention of the query
over tokens 1..k. It is not a softmax layer whose queries depend on the input: a layer needs
training, and cannot look up content. Forward 2ND FLOPs for the scores and about 2NCV with chunks
of C, a step O(D + V); no N x N matrix. Numerics: float32 at least inside, scores of any finite
size, no token before the first real one gives 0. No official code exists: where the paper leaves
a point open, ours is a reconstruction and says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.aaren.definition import (
    AarenState,
    aaren_reference,
    aaren_step,
    aaren_weights,
    combine,
    empty_state,
    prefix_step,
)
from manyheads.attention.aaren.fast import flops
from manyheads.attention.aaren.module import AarenAttention, AarenConfig
from manyheads.attention.aaren.op import (
    CHUNK,
    aaren,
    aaren_update,
    many_to_one,
    prefix_attention,
    prefix_states,
)
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "AarenAttention",
    "AarenConfig",
    "AarenState",
    "aaren",
    "aaren_reference",
    "aaren_step",
    "aaren_update",
    "aaren_weights",
    "combine",
    "empty_state",
    "many_to_one",
    "prefix_attention",
    "prefix_states",
    "prefix_step",
]


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    return {
        "query": draw(shape.heads, shape.head_dim),
        "key": draw(shape.batch, shape.hkv, shape.length, shape.head_dim),
        "value": draw(shape.batch, shape.hkv, shape.length, shape.dv),
    }


def _flops(s: Shape) -> int:
    rows = s.batch * s.heads
    return 2 * rows * s.length * s.head_dim + flops(rows, s.length, s.dv, CHUNK)


def _memory_numbers(s: Shape) -> int:
    """Outputs, scores and the states' m and u; repeated values."""
    repeated = s.dv if s.hkv != s.heads else 0
    return s.batch * s.heads * s.length * (s.dv + 4 + repeated)


register_mechanism(
    Mechanism(
        name="aaren",
        summary="softmax attention of one learned query over every prefix; no content lookup",
        paper="aaren",
        function=aaren,
        reference=aaren_reference,
        update=aaren_update,
        step=aaren_step,
        module=AarenAttention,
        config=AarenConfig,
        causal=True,
        bidirectional=False,
        positional=False,
        exact=False,
        constant_state=True,
        cost="O(N D + N C V)",
        flops=_flops,
        bytes_moved=lambda s: (
            4 * s.batch * s.length * (s.hkv * (s.head_dim + s.dv) + s.heads * s.dv)
        ),
        state_numbers=lambda s: s.batch * s.heads * (s.dv + 2),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=(
            "the query does not depend on the input: one layer cannot do associative recall",
            "blind to order inside a prefix: add positions to the inputs",
        ),
    )
)
