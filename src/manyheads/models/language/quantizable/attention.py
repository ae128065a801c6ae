"""Attention of BERT and OPT with clipping and gates, open at the points that are quantised.

B batch, N length, C embed_dim, H heads, D head dim. A tap is an ``nn.Identity`` that a simulated
quantiser may replace. While taps are closed and nothing is padded, attention runs fused; otherwise
through the matrix, as the official code does, rows without any real key included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.clipped_softmax.definition import stretch
from manyheads.attention.gated.definition import apply_gate
from manyheads.attention.gated.op import attend, attend_update
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.layers.activations import activation
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.models.language.quantizable.config import QuantizableConfig

__all__ = [
    "ActivatedLinear",
    "Attended",
    "BERTSelfAttention",
    "HostAttention",
    "OPTSelfAttention",
    "TiedHead",
]


class ActivatedLinear(nn.Linear):
    """act(W x + b): quantised as one, behind the activation."""

    def __init__(self, dim: int, width: int, act: str) -> None:
        super().__init__(dim, width)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class TiedHead(nn.Module):
    """x Wᵀ with the embedding's W: a module, so that a simulated quantiser may take its place."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Attended(NamedTuple):
    """What :meth:`HostAttention.context` saw: heads joined (B, N, C), weights (B, H, N, N), gates.

    ``gate`` is between 0 and 1, before ``gate_scale``; None without gates.
    """

    context: Tensor
    weights: Tensor
    gate: Tensor | None


class HostAttention(nn.Module):
    """Queries, keys and values, and what is done with them; see the subclasses.

    Args:
        dim: C.
        heads: H.
        config: clipping and gates.
        dropout: on attention weights, in training.
        project: whether there is an output matrix.
    """

    is_causal = False

    def __init__(
        self,
        dim: int,
        heads: int,
        config: QuantizableConfig,
        *,
        dropout: float = 0.0,
        project: bool = True,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"embed_dim {dim} is not a multiple of num_heads {heads}")
        self.heads, self.scale, self.dropout = heads, (dim // heads) ** -0.5, dropout
        self.clip = (config.clip_gamma, config.eta)
        self.gate_scale = config.gate_scale
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.gate = config.build_gate(dim, heads)
        self.out_proj = nn.Linear(dim, dim) if project else nn.Identity()
        self.scores_tap, self.probs_tap, self.context_tap = (nn.Identity() for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Mix whole sequences.

        Args:
            x: (B, N, C).
            bias: added to the scores, broadcast to (B, H, N, N), causality included; None for
                nothing padded.
        """
        if bias is not None or self._open() or (self.training and self.dropout):
            return self.out_proj(self.context(x, bias).context)
        q, k, v = self._project(x)
        heads = attend(q, k, v, *self.clip, is_causal=self.is_causal, scale=self.scale)
        return self._output(heads, x)

    def context(self, x: Tensor, bias: Tensor | None = None) -> Attended:
        """Attend through the matrix and return it; arguments as :meth:`forward`."""
        q, k, v = self._project(x)
        if bias is None and self.is_causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            bias = torch.zeros(later.shape, dtype=x.dtype, device=x.device)
            bias = bias.masked_fill(later, torch.finfo(x.dtype).min)
        scores = self._join(self.scores_tap(self._scores(q, k)), bias)
        work = torch.promote_types(scores.dtype, torch.float32)
        p = scores.softmax(-1, dtype=work)
        p = self.probs_tap(stretch(p, gamma=self.clip[0], eta=self.clip[1]).to(scores.dtype))
        heads = F.dropout(p, self.dropout, self.training) @ v
        gate = None if self.gate is None else self.gate(x)
        return Attended(
            merge_heads(self._gated(heads, gate)), p, None if gate is None else gate.sigmoid()
        )

    def update(
        self, x: Tensor, state: SoftmaxState, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        """Mix the next block of a causal sequence."""
        q, k, v = self._project(x)
        heads, state = attend_update(state, q, k, v, *self.clip, scale=self.scale, mask=mask)
        return self._output(heads, x), state

    def init_state(self, batch_size: int) -> SoftmaxState:
        """Return an empty cache."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch_size, self.heads, 0, weight.shape[0] // self.heads)
        length = torch.zeros(batch_size, dtype=torch.long, device=weight.device)
        return SoftmaxState(empty, empty, length)

    def _open(self) -> bool:
        taps = (self.scores_tap, self.probs_tap, self.context_tap)
        return not all(type(tap) is nn.Identity for tap in taps)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            split_heads(self.q_proj(x), self.heads),
            split_heads(self.k_proj(x), self.heads),
            split_heads(self.v_proj(x), self.heads),
        )

    def _output(self, heads: Tensor, x: Tensor) -> Tensor:
        gate = None if self.gate is None else self.gate(x)
        return self.out_proj(merge_heads(self._gated(heads, gate)))

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        raise NotImplementedError

    def _join(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _gated(self, heads: Tensor, gate: Tensor | None) -> Tensor:
        raise NotImplementedError


class BERTSelfAttention(HostAttention):
    """Bidirectional; the context is tapped behind the gate."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * self.scale

    def _join(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        return scores if bias is None else scores + bias

    def _gated(self, heads: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            heads = apply_gate(heads, gate, gate_scale=self.gate_scale)
        return self.context_tap(heads)


class OPTSelfAttention(HostAttention):
    """Causal; the context is tapped before the gate, queries are scaled behind their tap."""

    is_causal = True

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.mT

    def _join(self, scores: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None:
            return scores
        # A maximum, not a clamp: where a score was absorbed by the mask, half of the gradient
        # passes, as in the models that were trained so.
        least = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
        return torch.maximum(scores + bias, least.to(scores.device))

    def _gated(self, heads: Tensor, gate: Tensor | None) -> Tensor:
        heads = self.context_tap(heads)
        return heads if gate is None else apply_gate(heads, gate, gate_scale=self.gate_scale)
