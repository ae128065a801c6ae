"""Landmark attention: a token at the end of every block gates the attention to that block.

Query i: softmax over the tokens of its own block and the landmarks of earlier blocks; each
earlier block shares out the probability of its landmark by a softmax of its own. (B, H, N, D)
tensors. Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", 2305.16300. At inference the k blocks whose landmarks score best are fetched from a
memory of any size, on the CPU or in a file (:class:`LandmarkMemory`).

Exact evaluation of its own definition, which is not softmax attention: a layer needs training.
Causal only. Time O(N² D), two-level online softmax without an N x N matrix for regular blocks;
with a memory N/L landmark scores and k·L keys a token. Numerics: softmax in float32 at least, each
group's own maximum subtracted; a query that sees no key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.landmark.definition import (
    BLOCK_SIZE,
    LandmarkGroups,
    landmark_groups,
    landmark_reference,
    regular_landmarks,
)
from manyheads.attention.landmark.fast import block_flops
from manyheads.attention.landmark.groups import grouped_softmax, landmark_weights
from manyheads.attention.landmark.maps import landmark_block_mask
from manyheads.attention.landmark.memory import LandmarkMemory, Retrieved
from manyheads.attention.landmark.module import LandmarkAttention, LandmarkConfig
from manyheads.attention.landmark.op import (
    LandmarkState,
    landmark,
    landmark_step,
    landmark_update,
)
from manyheads.attention.landmark.recall import attend_with_memory
from manyheads.attention.landmark.tokens import (
    insert_landmarks,
    landmark_jumps,
    landmark_places,
    strip_landmarks,
)
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "LandmarkAttention",
    "LandmarkConfig",
    "LandmarkGroups",
    "LandmarkMemory",
    "LandmarkState",
    "Retrieved",
    "attend_with_memory",
    "grouped_softmax",
    "insert_landmarks",
    "landmark",
    "landmark_block_mask",
    "landmark_groups",
    "landmark_jumps",
    "landmark_places",
    "landmark_reference",
    "landmark_step",
    "landmark_update",
    "landmark_weights",
    "regular_landmarks",
    "strip_landmarks",
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
    head = block_flops(s.length, s.length, s.head_dim, s.dv, BLOCK_SIZE)
    return s.batch * s.heads * head


def _memory_numbers(s: Shape) -> int:
    # Whole blocks of queries (later outputs), keys and values, the output, and a tile of scores.
    padded = (s.length + BLOCK_SIZE) * (s.head_dim + s.dv + max(s.head_dim, s.dv))
    return s.batch * s.heads * (padded + s.length * s.dv) + (1 << 18)


register_mechanism(
    Mechanism(
        name="landmark",
        summary="softmax attention gated block by block by landmark tokens, for fetching blocks",
        paper="landmark",
        function=landmark,
        reference=landmark_reference,
        update=landmark_update,
        step=landmark_step,
        module=LandmarkAttention,
        config=LandmarkConfig,
        causal=True,
        bidirectional=False,
        positional=True,
        exact=False,
        constant_state=False,
        cost="O(N² D), with memory O(N (N/L + k L) D)",
        flops=_flops,
        bytes_moved=lambda s: 4 * s.batch * s.length * (s.heads + s.hkv) * (s.head_dim + s.dv),
        state_numbers=lambda s: s.batch * s.hkv * s.length * (s.head_dim + s.dv),
        memory_numbers=_memory_numbers,
        inputs=_inputs,
        notes=(
            "a landmark ends every block: its value is never read, so that it has to be a token of "
            "its own",
        ),
    )
)
