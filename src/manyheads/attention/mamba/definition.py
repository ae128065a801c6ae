"""The selective state space by its definition, and one token at a time.

B batch, H groups, N length, D state size, V channels a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.precision import without_autocast
from manyheads.native import library, strided

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
    q, k, x, d, rates = (t.to(memory) for t in (query, key, value, delta, a))
    low, z, through = (None if t is None else t.to(memory) for t in (delta_bias, gate, skip))
    k, x, d = (repeat_kv(t, heads) for t in (k, x, d))
    rates = repeat_kv(rates[None], heads)[0]
    low, through = (None if t is None else repeat_kv(t[None], heads)[0] for t in (low, through))
    run = _step if torch.is_grad_enabled() else _step_op  # the operator has no backward
    out, memory = run(q, k, x, d, rates, memory, through, z, low, delta_softplus)
    return out.to(query.dtype), MambaState(memory)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    steps = step_sizes(delta[:, :, None], bias, softplus)[:, :, 0]
    added = (steps * value)[..., None] * key[..., None, :]
    memory = torch.addcmul(added, (steps[..., None] * a).exp(), memory)
    out = (memory @ query[..., None]).squeeze(-1)
    if skip is not None:
        out = out + skip * value
    if gate is not None:
        out = out * F.silu(gate)
    return out, memory


@torch.library.custom_op("manyheads::mamba_step", mutates_args=())
@without_autocast
def _step_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    delta: Tensor,
    a: Tensor,
    memory: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    lib = library("scan", like=query)
    if lib is None:
        return _step(query, key, value, delta, a, memory, skip, gate, bias, softplus)
    moving = [t if t is None or t.stride(-1) == 1 else t.contiguous()
              for t in (query, key, value, delta, gate)]  # fmt: skip
    fixed = [None if t is None else t.contiguous() for t in (a, skip, bias, memory)]
    after = memory.new_empty(memory.shape)
    out = value.new_empty(value.shape)
    sizes = (*query.shape, value.shape[2], int(softplus), torch.get_num_threads())
    strides = tuple(s for t in moving for s in ((0, 0) if t is None else t.stride()[:2]))
    lib("scan_step", *map(strided, moving), *fixed, after, out, sizes, strides)
    return out, after


@_step_op.register_fake
def _(query, key, value, delta, a, memory, *rest):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape), memory.new_empty(memory.shape)


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
