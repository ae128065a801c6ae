"""Gated attention on whole, padded, packed and continued sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor

from manyheads.attention.clipped_softmax.op import clipped_softmax, clipped_softmax_update
from manyheads.attention.gated.definition import apply_gate, check_gate
from manyheads.attention.softmax.op import SoftmaxState, softmax, softmax_update
from manyheads.layers.heads import check_qkv

__all__ = ["attend", "attend_update", "gated", "gated_step", "gated_update"]


def gated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    gate_scale: float = 1.0,
    gamma: float = 0.0,
    eta: float = 1.0,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """sigmoid(G) ∘ (softmax(scale · Q Kᵀ) V) for each head. Another function: needs training.

    A head that has nothing to add closes its gate in place of driving scores apart (Bondarenko
    et al., 2306.12929). Softmax attention runs as one fused call; O(N M) time.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        gate: logits, broadcast to (B, H, N, 1); see :class:`HeadGate`.
        gate_scale: factor on the gates, 1 / pi of a model that was trained without gates.
        gamma, eta: a clipped softmax under the gate; 0 and 1 for a plain one.
        attn_mask, is_causal, scale, mask, cu_seqlens: see :func:`~manyheads.attention.softmax`.

    Returns:
        (B, H, N, V).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> q = k = v = torch.randn(1, 2, 10, 16)
        >>> gated(q, k, v, torch.zeros(1, 2, 10, 1), is_causal=True).shape
        torch.Size([1, 2, 10, 16])
    """
    check_qkv(query, key, value, same_length=is_causal)
    check_gate(gate, query)
    heads = attend(
        query, key, value, gamma, eta, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return apply_gate(heads, gate, gate_scale=gate_scale)


def gated_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    gate_scale: float = 1.0,
    gamma: float = 0.0,
    eta: float = 1.0,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, N, D); key, value: (B, H_kv, N, D and V); gate: (B, H, N, 1).
        gate_scale, gamma, eta, scale: as in :func:`gated`.
        mask: (B, N), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_gate(gate, query)
    heads, state = attend_update(state, query, key, value, gamma, eta, scale=scale, mask=mask)
    return apply_gate(heads, gate, gate_scale=gate_scale), state


def gated_step(
    state: SoftmaxState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    gate_scale: float = 1.0,
    gamma: float = 0.0,
    eta: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V); gate: (B, H, 1).
        gate_scale, gamma, eta, scale: as in :func:`gated`.

    Returns:
        The output (B, H, V) and the next state.
    """
    block = (t[:, :, None] for t in (query, key, value, gate))
    out, state = gated_update(
        state, *block, gate_scale=gate_scale, gamma=gamma, eta=eta, scale=scale
    )
    return out[:, :, 0], state


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: float,
    eta: float,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Attend with a clipped softmax, or by one fused call where gamma is 0 and eta 1."""
    if (gamma, eta) == (0, 1):
        return softmax(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, mask=mask,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip
    return clipped_softmax(
        query, key, value, gamma=gamma, eta=eta, attn_mask=attn_mask, is_causal=is_causal,
        scale=scale, mask=mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip


def attend_update(
    state: SoftmaxState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gamma: float,
    eta: float,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, SoftmaxState]:
    """Update a cache as :func:`attend` attends."""
    if (gamma, eta) == (0, 1):
        return softmax_update(state, query, key, value, scale=scale, mask=mask)
    return clipped_softmax_update(
        state, query, key, value, gamma=gamma, eta=eta, scale=scale, mask=mask
    )
