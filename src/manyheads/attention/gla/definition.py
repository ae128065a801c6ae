"""Gated linear attention by its definition, and one token at a time.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.precision import without_autocast
from manyheads.native import library

__all__ = [
    "GLAState",
    "check_log_decay",
    "gla_recurrence",
    "gla_reference",
    "gla_step",
    "gla_weights",
]


class GLAState(NamedTuple):
    """The decoding state of one layer: ``memory`` (B, H, D, V), float32 at least."""

    memory: Tensor


def gla_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Run the recurrence token by token: the oracle of the tests.

    S_t = Diag(exp g_t) S_{t-1} + k_t v_tᵀ and o_t = scale · q_tᵀ S_t; the state decays before
    the new pair enters, so a token sees itself undecayed.
    """
    check_qkv(query, key, value, same_length=True)
    batch, heads, _, dim = query.shape
    key, value, log_decay = (repeat_kv(t, heads) for t in (key, value, log_decay))
    if mask is not None:
        keep = mask[:, None, :, None]
        query, key, log_decay = query * keep, key * keep, log_decay * keep
    memory = query.new_zeros(batch, heads, dim, value.shape[-1])
    return gla_recurrence(query, key, value, log_decay, memory, scale=scale)[0]


def gla_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence from a given memory (B, H, D, V): outputs and the final memory."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for t in range(query.shape[2]):
        new = key[:, :, t, :, None] * value[:, :, t, None, :]
        memory = log_decay[:, :, t, :, None].exp() * memory + new
        outputs.append((query[:, :, t, None] @ memory).squeeze(-2) * scale)
    return torch.stack(outputs, 2), memory


def gla_weights(
    query: Tensor, key: Tensor, log_decay: Tensor, *, scale: float | None = None
) -> Tensor:
    """Return the implied attention matrix: which token read which, and how strongly.

    A_ij = scale · Σ_d q_id k_jd exp(b_id − b_jd) for j ≤ i, with b the running sum of the log
    decay. Exact, but O(N² D) in time and memory: for looking at short sequences.

    Args:
        query: (B, H, N, D).
        key, log_decay: (B, H_kv, N, D).
        scale: factor on the scores, D ** -0.5 unless given.

    Returns:
        (B, H, N, N), zero above the diagonal.
    """
    heads, length = query.shape[1], query.shape[2]
    key, log_decay = repeat_kv(key, heads), repeat_kv(log_decay, heads)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    b = log_decay.cumsum(2)
    causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[..., None]
    gap = (b[:, :, :, None] - b[:, :, None]).masked_fill(~causal, -torch.inf)
    return scale * torch.einsum("bhid,bhjd,bhijd->bhij", query, key, gap.exp())


def gla_step(
    state: GLAState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, GLAState]:
    """Add one token in O(H D V) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (B, H, D).
        key, log_decay: (B, H_kv, D).
        value: (B, H_kv, V).
        scale: factor on the query, D ** -0.5 unless given.

    Returns:
        The output (B, H, V) and the next state.
    """
    memory = state.memory
    heads = query.shape[1]
    k, v, g = (repeat_kv(t.to(memory), heads) for t in (key, value, log_decay))
    q = query.to(memory) * (query.shape[-1] ** -0.5 if scale is None else scale)
    run = _step if torch.is_grad_enabled() else _step_op  # the operator has no backward
    out, memory = run(q, k, v, g, memory)
    return out.to(query.dtype), GLAState(memory)


def _step(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    added = key[..., None] * value[..., None, :]
    memory = torch.addcmul(added, log_decay.exp()[..., None], memory)
    return (query[..., None, :] @ memory).squeeze(-2), memory


@torch.library.custom_op("manyheads::gla_step", mutates_args=())
@without_autocast
def _step_op(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    lib = library("recurrent", like=query)
    if lib is None:
        return _step(query, key, value, log_decay, memory)
    out, after = value.new_empty(value.shape), memory.new_empty(memory.shape)
    batch, heads, dim = query.shape
    inputs = (t.contiguous() for t in (query, key, value, log_decay, memory))
    sizes = (batch * heads, 1, dim, value.shape[2], torch.get_num_threads())
    lib("recurrent_scan", *inputs, after, out, sizes)
    return out, after


@_step_op.register_fake
def _(query, key, value, log_decay, memory):  # type: ignore[no-untyped-def]
    return value.new_empty(value.shape), memory.new_empty(memory.shape)


def check_log_decay(key: Tensor, log_decay: Tensor) -> None:
    """Raise ValueError unless ``log_decay`` has the shape of ``key``."""
    if log_decay.shape != key.shape:
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}, expected that of key "
            f"{tuple(key.shape)}: one natural-log gate (<= 0) for each key channel"
        )
