"""NormAttention by its definition, and one token at a time.

B batch, H heads, N length, D head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.norms import simple_rms_norm
from manyheads.layers.recurrent import has_short_scan, short_scan

__all__ = ["NormState", "norm_over_heads", "norm_reference", "norm_step", "norm_weights"]


class NormState(NamedTuple):
    """The decoding state of one layer: ``memory`` (B, H_kv, D, V), float32 at least."""

    memory: Tensor


def norm_over_heads(x: Tensor, *, eps: float) -> Tensor:
    """SimpleRMSNorm of (B, H, N, V) over the H · V numbers of each token together."""
    merged = simple_rms_norm(x.transpose(1, 2).flatten(-2), eps=eps)
    return merged.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)


def _scores(
    query: Tensor, key: Tensor, is_causal: bool, scale: float | None, mask: Tensor | None
) -> Tensor:
    scores = query @ repeat_kv(key, query.shape[1]).mT * (1.0 if scale is None else scale)
    if is_causal:
        scores = scores.tril()
    if mask is not None:
        scores = scores * (mask[:, None, None] & mask[:, None, :, None])
    return scores


def norm_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
    normalize: bool = True,
) -> Tensor:
    """(Q Kᵀ masked to 0) V through the N x N matrix, then the norm: the oracle of the tests."""
    check_qkv(query, key, value, same_length=True)
    scores = _scores(query, key, is_causal, scale, mask)
    out = scores @ repeat_kv(value, query.shape[1])
    return norm_over_heads(out, eps=eps) if normalize else out


def norm_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Return the implied attention matrix (B, H, N, N): out = weights @ value.

    q_i · k_j over the norm of the whole output of token i, so that it depends on the values; may
    be negative, and rows do not sum to 1. O(N² D): for looking at short sequences.
    """
    scores = _scores(query, key, is_causal, scale, mask)
    out = scores @ repeat_kv(value, query.shape[1])
    rms = out.square().mean((1, 3), keepdim=True).sqrt()
    return scores / (rms + eps)


def norm_step(
    state: NormState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    eps: float = 1e-8,
    normalize: bool = True,
) -> tuple[Tensor, NormState]:
    """Add one token in O(H D V) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (B, H, D); key, value: (B, H_kv, D and V).
        scale, eps, normalize: as in :func:`manyheads.attention.norm`.

    Returns:
        The output (B, H, V) and the next state.
    """
    heads = query.shape[1]
    key, value = key.to(state.memory), value.to(state.memory)
    q = query.to(state.memory) if scale is None else query.to(state.memory) * scale
    token = (q[:, :, None], key[:, :, None], value[:, :, None])
    if heads == key.shape[1] and has_short_scan(*token, state.memory):
        out, memory = short_scan(*token, None, state.memory)  # (B, H, 1, V)
    else:
        memory = torch.addcmul(state.memory, key[..., None], value[..., None, :])
        out = q[:, :, None] @ repeat_kv(memory, heads)
    if normalize:
        out = norm_over_heads(out, eps=eps)
    return out.squeeze(2).to(query.dtype), NormState(memory)
