"""Orchid: a global circular convolution whose kernel depends on the input, between two gates.

out = query ⊙ (h * (key ⊙ value)), y_i = Σ_j h_j x_{(i - j) mod N} for each channel, with a kernel
h = h_0 + h(x) as long as the sequence. (B, H, N, D) throughout. Karami and Ghodsi, "Orchid:
Flexible and Data-Dependent Convolution for Sequence Modeling", 2402.18508.

Bidirectional only: every output sees all tokens, and the circle closes, so that the first token
sees the last as a neighbour. Not softmax attention: a layer needs training. O(N D log N), three
real FFTs a channel, worked through in tiles; nothing of N x N is made. Numerics: transforms in
float32 at least, any length. Padding is cut out, not masked, since the circle has the length of
the sequence.
"""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor

from manyheads.attention.orchid.conditioning import conditioning_type1, conditioning_type2
from manyheads.attention.orchid.config import OrchidConfig
from manyheads.attention.orchid.definition import circular_conv_reference, orchid_reference
from manyheads.attention.orchid.fast import TILE_NUMBERS, tiles
from manyheads.attention.orchid.module import OrchidAttention
from manyheads.attention.orchid.op import circular_conv, orchid
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "OrchidAttention",
    "OrchidConfig",
    "circular_conv",
    "circular_conv_reference",
    "conditioning_type1",
    "conditioning_type2",
    "orchid",
    "orchid_reference",
]


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(heads: int) -> Tensor:
        return torch.randn(shape.batch, heads, shape.length, shape.head_dim, generator=generator)

    return {
        "query": draw(shape.heads),
        "key": draw(shape.hkv),
        "value": draw(shape.hkv),
        "kernel": draw(shape.hkv) * shape.length**-0.5,
    }


def _numbers(s: Shape) -> int:
    return s.batch * s.heads * s.length * s.head_dim


def _flops(s: Shape) -> int:
    """Three real transforms, 5/2 N log2 N each for a channel, in the tiles that are computed."""
    if s.length < 2:
        return 0
    total = 0
    for rows, heads, _, channels in tiles(s.batch, s.heads, s.length, s.head_dim):
        count = prod(part.stop - part.start for part in (rows, heads, channels))
        total += 3 * round(2.5 * count * s.length * math.log2(s.length))
    return total


def _tile(s: Shape) -> int:
    return max(TILE_NUMBERS, s.length * min(s.head_dim, 16))


register_mechanism(
    Mechanism(
        name="orchid",
        summary="a global circular convolution with a kernel made from the input, between gates",
        paper="orchid",
        function=orchid,
        reference=orchid_reference,
        module=OrchidAttention,
        config=OrchidConfig,
        causal=False,
        bidirectional=True,
        positional=True,
        exact=False,
        constant_state=False,
        cost="O(N D log N)",
        flops=_flops,
        bytes_moved=lambda s: 4 * 5 * _numbers(s),
        state_numbers=lambda s: 0,
        memory_numbers=lambda s: _numbers(s) + 5 * min(_numbers(s), _tile(s)),
        inputs=_inputs,
        notes=(
            "no causal form: encoders only",
            "padded rows are computed one length at a time: sort batches by length",
        ),
    )
)
