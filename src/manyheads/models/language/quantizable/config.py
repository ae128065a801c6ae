"""What BERT and OPT of 2306.12929 share: the two changes of their attention, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyheads.attention.clipped_softmax.definition import check_stretch
from manyheads.attention.gated.gate import GATE_NETS, GATES, GateKind, GateNet, HeadGate
from manyheads.config import Config
from manyheads.errors import nearest, unknown_name

__all__ = ["QuantizableConfig", "read_official"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizableConfig(Config):
    """A clipped softmax, gates on heads, both or neither.

    Attributes:
        gamma, eta: ends of the stretched softmax; 0 and 1 for a plain one.
        alpha: gamma is −alpha / max_length where it is given.
        max_length: the training length that ``alpha`` refers to.
        gate, gate_net, gate_init, fine_tuning, gate_std: see
            :class:`manyheads.attention.GatedConfig`; "none" for no gate.
    """

    gamma: float = 0.0
    eta: float = 1.0
    alpha: float | None = None
    max_length: int | None = None
    gate: GateKind = "none"
    gate_net: GateNet = "linear"
    gate_init: float | None = None
    fine_tuning: bool = False
    gate_std: float = 0.01

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise unknown_name("gate", self.gate, GATES)
        if self.gate_net not in GATE_NETS:
            raise unknown_name("gate_net", self.gate_net, GATE_NETS)
        if self.alpha is not None and (self.max_length is None or self.alpha < 0):
            raise ValueError(
                f"alpha {self.alpha} must be at least 0 and needs max_length, the training length "
                f"(given: {self.max_length})"
            )
        if self.alpha is not None and self.gamma != 0:
            raise ValueError(f"give gamma ({self.gamma}) or alpha ({self.alpha}), not both")
        if self.fine_tuning and self.gate != "none" and self.gate_init is None:
            raise ValueError("fine_tuning divides the gates by gate_init: give it, e.g. 0.5")
        check_stretch(self.clip_gamma, self.eta)

    @property
    def clip_gamma(self) -> float:
        """The lower end of the stretched interval."""
        if self.alpha is None or self.max_length is None:
            return self.gamma
        return -self.alpha / self.max_length

    @property
    def gate_scale(self) -> float:
        """Factor on the gates."""
        return 1 / self.gate_init if self.fine_tuning and self.gate_init is not None else 1.0

    @property
    def looks_ahead(self) -> bool:
        """Whether the gates read later tokens."""
        return self.gate == "per_head" and self.gate_net != "all_features"

    def build_gate(self, dim: int, heads: int) -> HeadGate | None:
        """Build the gate of one layer, None for "none"."""
        if self.gate == "none":
            return None
        return HeadGate(
            dim, heads, kind=self.gate, net=self.gate_net, init=self.gate_init,
            weight_std=self.gate_std if self.fine_tuning else None,
        )  # fmt: skip


_SHARED = {
    "max_seq_length": "max_length",
    "alpha": "alpha",
    "attn_gate_init": "gate_init",
    "fine_tuning": "fine_tuning",
    "gamma": "gamma",
    "eta": "eta",
}
_KINDS = {
    "none": "none",
    "unconditional_per_head": "constant",
    "conditional_per_head": "per_head",
    "conditional_per_token": "per_token",
}
_NETS = {
    "attn_gate_linear_all_features": "all_features",
    "attn_gate_mlp": "mlp",
    "attn_gate_mlp2": "mlp2",
}


def read_official(
    official: Mapping[str, Any], names: Mapping[str, str], ignored: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the options of an official config under our names.

    Args:
        official: keys of a Hugging Face config and of the official attention.
        names: official keys of the host model to ours.
        ignored: keys without an effect here.

    Raises:
        ValueError: a key or a kind of gate is unknown; the nearest is named.
    """
    known = {**names, **_SHARED}
    values: dict[str, Any] = {}
    for key, value in official.items():
        if key in known:
            values[known[key]] = value
        elif key == "attn_gate_type":
            kind = str(value).rpartition(".")[2]
            if kind not in _KINDS:
                raise unknown_name("attn_gate_type", kind, _KINDS)
            values["gate"] = _KINDS[kind]
        elif key not in _NETS and key not in ignored:
            everything = [*known, *_NETS, *ignored, "attn_gate_type"]
            raise ValueError(f"unknown key {key!r} in an official config{nearest(key, everything)}")
    for key, net in _NETS.items():
        if official.get(key):
            values.setdefault("gate_net", net)
    return values
