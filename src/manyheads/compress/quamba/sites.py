"""Where a Mamba block is quantised, and what its activations are there.

B batch, N length, C width, E inner channels, R width of the step's projection, G groups, D states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.mamba import MambaLayerState, MambaMixer, MambaState, mamba_update
from manyheads.compress.quamba.hadamard import hadamard_transform
from manyheads.layers.heads import merge_heads, split_heads

__all__ = ["OFFICIAL_SITES", "SITES", "WEIGHTS", "Trace", "run_block"]

SITES = ("input", "conv_in", "gate", "u", "dt_low", "key", "query", "dt", "dt_raw", "y")
"""Activations of a block, in order: its input, the convolution's input, z, the convolution's output
(scan and x_proj read the same), the step before dt_proj, B, C, the step with and without its bias,
the scan's gated output (rotated where a rotation is asked for)."""

OFFICIAL_SITES = {
    "input": "mamba_in_quant",
    "conv_in": "conv_in_quant",
    "gate": "z_quant",
    "u": "u_quant",
    "dt_low": "dt_proj_in_quant",
    "key": "B_quant",
    "query": "C_quant",
    "dt": "dt_quant",
    "y": "ssm_out_quant",
}
"""Names of the official code's quantisers; it has none before the step's bias."""

WEIGHTS = ("in_proj", "conv", "x_proj", "dt_proj", "out_proj", "a_log", "skip")
"""What is quantised of a block's parameters, in both forms."""

Quantiser = Callable[[str, Tensor], Tensor]


class Trace(NamedTuple):
    """Output (B, N, C), next state, and what passed each site by name, (B, N, ·), beside ``scan``:
    the scan's output before its rotation."""

    out: Tensor
    state: MambaLayerState
    seen: dict[str, Tensor]


def run_block(
    block: MambaMixer,
    x: Tensor,
    *,
    state: MambaLayerState | None = None,
    mask: Tensor | None = None,
    hadamard: bool,
    at: Quantiser = lambda name, t: t,
) -> Trace:
    """Run a block from end to end and pass each activation through ``at(site, activation)``.

    With ``hadamard`` the scan's output is rotated; the block's ``out_proj`` must hold the rotation
    already, or its output means nothing.
    """
    c, seen = block.config, dict[str, Tensor]()

    def pass_through(name: str, t: Tensor) -> Tensor:
        seen[name] = at(name, t)
        return seen[name]

    u, z = block.in_proj(pass_through("input", x)).chunk(2, -1)
    u, z = pass_through("conv_in", u), pass_through("gate", z)
    before = None if state is None else state.conv.mT
    u, last = block.conv(u, before, mask=mask)
    u = pass_through("u", u)
    shared = c.num_heads * c.state_dim
    low, key, query = block.x_proj(u).split((c.rank, shared, shared), -1)
    low, key, query = (
        pass_through(n, t)
        for n, t in zip(("dt_low", "key", "query"), (low, key, query), strict=True)
    )
    raw = pass_through("dt_raw", F.linear(low, block.dt_proj.weight))
    dt = pass_through("dt", raw + block.dt_proj.bias)
    rates = -block.a_log.to(torch.promote_types(block.a_log.dtype, torch.float32)).exp()
    memory = None if state is None else state.ssm.unflatten(1, (c.num_heads, -1))
    q, k, v, d, g = (split_heads(t, c.num_heads) for t in (query, key, u, dt, z))
    y, after = mamba_update(
        None if memory is None else MambaState(memory), q, k, v, d,
        rates.unflatten(0, (c.num_heads, -1)),
        skip=block.skip.unflatten(0, (c.num_heads, -1)), gate=g, mask=mask,
    )  # fmt: skip
    y = seen["scan"] = merge_heads(y).to(x.dtype)
    y = pass_through("y", hadamard_transform(y) if hadamard else y)
    out = block.out_proj(y)
    if mask is not None:
        out = out.masked_fill(~mask[..., None], 0)
    return Trace(out, MambaLayerState(last.mT, after.memory.flatten(1, 2)), seen)
