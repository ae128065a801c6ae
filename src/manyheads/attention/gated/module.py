"""The softmax layer with a gate on each head. Shapes as of the softmax layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyheads.attention.clipped_softmax.definition import check_stretch
from manyheads.attention.gated.definition import apply_gate
from manyheads.attention.gated.gate import GATE_NETS, GATES, GateKind, GateNet, HeadGate
from manyheads.attention.gated.op import attend, attend_update
from manyheads.attention.softmax.module import SoftmaxAttention, SoftmaxConfig
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.errors import unknown_name
from manyheads.layers.keymap import KeyMap

__all__ = ["GatedAttention", "GatedConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConfig(SoftmaxConfig):
    """Sizes of a softmax layer and the gate of its heads.

    Attributes:
        gate: "per_token", "constant" (one number a head), or "per_head" (averaged over all
            tokens, so not for causal layers).
        gate_net: "linear", "mlp" (head dim / 4 hidden units), "mlp2" (head dim), both for each
            head by itself, or "all_features" (one matrix on the whole token).
        gate_init: openness that "linear" and "constant" gates start near (None: 0.5).
        fine_tuning: for a model trained without gates: they are divided by ``gate_init`` and
            their weights start small, so that the layer starts near what it was.
        gate_std: of those weights.
        gamma, eta: of a clipped softmax under the gate (0 and 1: a plain one).
    """

    gate: GateKind = "per_token"
    gate_net: GateNet = "linear"
    gate_init: float | None = None
    fine_tuning: bool = False
    gate_std: float = 0.01
    gamma: float = 0.0
    eta: float = 1.0

    def __post_init__(self) -> None:
        super(GatedConfig, self).__post_init__()
        if self.gate not in GATES[:-1]:
            raise unknown_name("gate", self.gate, GATES[:-1])
        if self.gate_net not in GATE_NETS:
            raise unknown_name("gate_net", self.gate_net, GATE_NETS)
        if self.gate == "per_head" and self.is_causal and self.gate_net != "all_features":
            raise ValueError(
                "gate='per_head' averages over later tokens: give is_causal=False or 'per_token'"
            )
        if self.fine_tuning and self.gate_init is None:
            raise ValueError("fine_tuning divides the gates by gate_init: give it, e.g. 0.5")
        check_stretch(self.gamma, self.eta)

    @property
    def gate_scale(self) -> float:
        """Factor on the gates."""
        return 1 / self.gate_init if self.fine_tuning and self.gate_init is not None else 1.0


class GatedAttention(SoftmaxAttention):
    """Attention whose heads can be closed (2306.12929). Another function: needs training.

    Names and state of :class:`manyheads.attention.SoftmaxAttention`, with the gate as ``alpha``.

    Example:
        >>> layer = GatedAttention(GatedConfig(embed_dim=64, num_heads=4, gate_init=0.25))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "gated"
    config: GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        c = config
        self.gate = HeadGate(
            c.embed_dim, c.num_heads, kind=c.gate, net=c.gate_net, init=c.gate_init,
            weight_std=c.gate_std if c.fine_tuning else None,
        )  # fmt: skip

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        c = self.config
        return attend(
            q, k, v, c.gamma, c.eta, is_causal=c.is_causal, mask=mask, cu_seqlens=cu_seqlens
        )

    def _attend_cache(
        self, cache: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        return attend_update(cache, q, k, v, self.config.gamma, self.config.eta, mask=mask)

    def _attend_kept(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        return attend(q, k, v, self.config.gamma, self.config.eta, attn_mask=allowed)

    def _output(
        self, heads: Tensor, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        gate = self.gate(x, mask=mask, cu_seqlens=cu_seqlens)
        heads = apply_gate(heads, gate, gate_scale=self.config.gate_scale)
        return super()._output(heads, x, mask, cu_seqlens)

    def key_map(self) -> KeyMap:
        """The names of the softmax layer, and those of the official gates."""
        return KeyMap(*super().key_map().entries, *self.gate.entries("gate", "alpha"))
