"""Mamba-1's selective scan: a diagonal state space whose steps, inputs and outputs are learned.

S_t = exp(δ_t A) S_{t-1} + δ_t x_t B_tᵀ,  y_t = S_t C_t + D x_t  (times silu(z_t)), for each
channel, with δ_t, B_t, C_t made from the input. (B, H, N, D) queries (C) and keys (B), (B, H, N,
V) values (x) and steps; a head is a group of channels that share B and C. Gu and Dao, "Mamba:
Linear-Time Sequence Modeling with Selective State Spaces", 2312.00752.

Causal only. Exact evaluation of its own definition, which is not softmax attention: a layer needs
training. Forward about 6 N D V operations a head, of which 2 N D V are matrix products, by compiled
kernels where they can be had; the state is D·V numbers, whatever the context; (B, H, N, D, V)
never exists, forward or backward.
Numerics: states, decays and their gradients in float32 at least; steps of any size are safe.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.mamba.definition import MambaState, mamba_reference, mamba_step
from manyheads.attention.mamba.module import MambaConfig, MambaLayerState, MambaMixer
from manyheads.attention.mamba.op import CHUNK_SIZE, mamba, mamba_update
from manyheads.attention.mamba.scan import selective_scan
from manyheads.registry import Mechanism, Shape, register_mechanism

__all__ = [
    "MambaConfig",
    "MambaLayerState",
    "MambaMixer",
    "MambaState",
    "mamba",
    "mamba_reference",
    "mamba_step",
    "mamba_update",
    "selective_scan",
]


# Of the published models, whatever the width of a head: the channels are the values.
_STATES = 16


def _inputs(shape: Shape, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    tokens = (shape.batch, shape.hkv, shape.length)
    return {
        "query": draw(shape.batch, shape.heads, shape.length, _STATES),
        "key": draw(*tokens, _STATES),
        "value": draw(*tokens, shape.dv),
        "delta": draw(*tokens, shape.dv) - 3,
        "a": -draw(shape.hkv, shape.dv, _STATES).exp(),
    }


def _states(s: Shape) -> int:
    return s.batch * s.heads * _STATES * s.dv


def _memory(s: Shape) -> int:
    """Outputs, and for the backward one memory a chunk."""
    outputs = s.batch * s.heads * s.length * s.dv
    return outputs + _states(s) * (-(-s.length // CHUNK_SIZE) + 2)


register_mechanism(
    Mechanism(
        name="mamba",
        summary="selective state space: each channel forgets at rates that its input sets",
        paper=None,
        function=mamba,
        reference=mamba_reference,
        update=mamba_update,
        step=mamba_step,
        module=MambaMixer,
        config=MambaConfig,
        causal=True,
        bidirectional=False,
        positional=True,
        exact=False,
        constant_state=True,
        cost="O(N D V)",
        flops=lambda s: 2 * _states(s) * s.length,
        bytes_moved=lambda s: 4 * s.batch * s.heads * s.length * (2 * _STATES + 3 * s.dv),
        state_numbers=_states,
        memory_numbers=_memory,
        inputs=_inputs,
        notes=(
            "a workload's head_dim are the channels of a group; each has the published 16 states",
            "one exponential for each token, channel and state sets its speed, and is not in flops",
        ),
    )
)
