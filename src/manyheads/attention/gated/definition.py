"""Gated attention by its definition. B batch, H heads, N queries, M keys, D head dim."""

from __future__ import annotations

from torch import Tensor

from manyheads.attention.clipped_softmax.definition import clipped_softmax_reference

__all__ = ["apply_gate", "check_gate", "gated_reference"]


def check_gate(gate: Tensor, query: Tensor) -> None:
    """Check the logits of gates against the queries (B, H, N, D).

    Raises:
        ValueError: names the axis, what was given and what is needed.
    """
    want = (*query.shape[:3], 1)
    if gate.ndim != 4 or any(n not in (1, m) for n, m in zip(gate.shape, want, strict=True)):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}, expected logits that broadcast to "
            f"(batch, heads, length, 1) = {want}"
        )


def apply_gate(heads: Tensor, gate: Tensor, *, gate_scale: float = 1.0) -> Tensor:
    """Return gate_scale · sigmoid(gate) · heads for heads (B, H, N, V)."""
    opened = gate.sigmoid()
    return heads * (opened if gate_scale == 1 else opened * gate_scale)


def gated_reference(
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
) -> Tensor:
    """gate_scale · sigmoid(G) ∘ (softmax(scale · Q Kᵀ) V): the oracle of the tests."""
    check_gate(gate, query)
    heads = clipped_softmax_reference(
        query, key, value, gamma=gamma, eta=eta, attn_mask=attn_mask, is_causal=is_causal,
        scale=scale, mask=mask,
    )  # fmt: skip
    return apply_gate(heads, gate, gate_scale=gate_scale)
