"""The selective state space by its definition, and one token at a time.

B batch, H groups, N length, D state size, V channels a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = [
    "MambaState",
    "check_scan",
    "mamba_recurrence",
    "mamba_reference",
    "mamba_step",
    "step_sizes",
]


class MambaState(NamedTuple):
    """The decoding state of one scan: ``memory`` (B, H, V, D), float32 at least."""

    memory: Tensor


def mamba_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    """Run the recurrence token by token: the oracle of the tests. Arguments as in `mamba`.

    S_t = exp(δ_t A) S_{t-1} + δ_t x_t B_tᵀ, y_t = S_t C_t + D x_t, times silu(z_t), where C, B, x
    are query, key, value and every channel has a step δ and a row of A of its own.
    """
    check_qkv(query, key, value, same_length=True)
    check_scan(key, value, delta, a)
    heads = query.shape[1]
    delta = step_sizes(delta, delta_bias, delta_softplus)
    skipped = None if skip is None else repeat_kv(skip[:, None] * value, heads)
    key, value, delta = (repeat_kv(t, heads) for t in (key, value, delta))
    a = repeat_kv(a[None], heads)[0]
    if mask is not None:
        delta = delta * mask[:, None, :, None]
    memory = query.new_zeros(query.shape[0], *a.shape)
    out = mamba_recurrence(query, key, value, delta, a, memory)[0]
    out = out if skipped is None else out + skipped
    out = out if gate is None else out * F.silu(gate)
    return out if mask is None else out * mask[:, None, :, None]


def mamba_recurrence(
    query: Tensor, key: Tensor, value: Tensor, delta: Tensor, a: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence from a given memory (B, H, V, D): outputs (B, H, N, V), final memory.

    ``delta`` holds the steps themselves (positive); all tensors have H groups.
    """
    outputs = []
    for t in range(query.shape[2]):
        step = delta[:, :, t, :, None]
        new = step * value[:, :, t, :, None] * key[:, :, t, None, :]
        memory = (step * a).exp() * memory + new
        outputs.append((memory @ query[:, :, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 2), memory


def mamba_step(
    state: MambaState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    *,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> tuple[Tensor, MambaState]:
    """Add one token in O(H D V) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (B, H, D).
        key: (B, H_kv, D).
        value, delta: (B, H_kv, V).
        a: (H_kv, V, D).
        skip, delta_bias: (H_kv, V), or None.
        gate: (B, H, V), or None.
        delta_softplus: whether ``delta`` is given before the softplus.

    Returns:
        The output (B, H, V) and the next state.
    """
    memory, heads = state.memory, query.shape[1]
    bias = None if delta_bias is None else delta_bias.to(memory)
    steps = step_sizes(delta.to(memory)[:, :, None], bias, delta_softplus)[:, :, 0]
    x = value.to(memory)
    added = repeat_kv(steps * x, heads)[..., None] * repeat_kv(key.to(memory), heads)[..., None, :]
    rate = repeat_kv(steps, heads)[..., None] * repeat_kv(a.to(memory)[None], heads)
    memory = torch.addcmul(added, rate.exp(), memory)
    out = (memory @ query.to(memory)[..., None]).squeeze(-1)
    if skip is not None:
        out = out + repeat_kv(skip.to(memory) * x, heads)
    if gate is not None:
        out = out * F.silu(gate.to(memory))
    return out.to(query.dtype), MambaState(memory)


def step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """Return the steps δ: bias (H, V) added to (B, H, N, V), then softplus."""
    if bias is not None:
        delta = delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def check_scan(key: Tensor, value: Tensor, delta: Tensor, a: Tensor) -> None:
    """Raise ValueError unless ``delta`` has the shape of ``value`` and ``a`` is (H_kv, V, D)."""
    if delta.shape != value.shape:
        raise ValueError(
            f"delta has shape {tuple(delta.shape)}, expected that of value "
            f"{tuple(value.shape)}: one step for each token and channel"
        )
    expected = (key.shape[1], value.shape[3], key.shape[3])
    if a.shape != expected:
        raise ValueError(
            f"a has shape {tuple(a.shape)}, expected (groups, channels, state) = {expected}: "
            "one decay rate (< 0) for each channel and state"
        )
