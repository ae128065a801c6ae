"""Channel mixers. B batch, N length, C dim."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.layers.activations import activation

__all__ = ["GatedMLP", "swiglu_width"]


def swiglu_width(dim: int, *, ratio: float = 4, multiple: int = 256) -> int:
    """Return the hidden width of a gated MLP with the parameters of a plain one of ``ratio``.

    Two thirds of ratio · dim, rounded up to a multiple.
    """
    return multiple * -(-int(dim * ratio * 2 / 3) // multiple)


class GatedMLP(nn.Module):
    """down(act(gate(x)) · up(x)), as in LLaMA (2002.05202)."""

    def __init__(
        self, dim: int, hidden: int, *, activation_name: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)
        self.act = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
