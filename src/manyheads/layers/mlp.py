"""Channel mixers. B batch, N length, C dim."""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.layers.activations import activation
from manyheads.layers.few_rows import Linear

__all__ = ["MLP", "GatedMLP", "PlainMLP", "swiglu_width"]


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
        self.gate_proj = Linear(dim, hidden, bias=bias)
        self.up_proj = Linear(dim, hidden, bias=bias)
        self.down_proj = Linear(hidden, dim, bias=bias)
        self.act = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class PlainMLP(nn.Module):
    """down(act(up(x))), without biases."""

    def __init__(self, dim: int, hidden: int, *, activation_name: str = "gelu") -> None:
        super().__init__()
        self.up_proj = Linear(dim, hidden, bias=False)
        self.down_proj = Linear(hidden, dim, bias=False)
        self.act = activation(activation_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class MLP(nn.Module):
    """fc2(act(fc1(x))), with biases and dropout after either."""

    def __init__(
        self, dim: int, hidden: int, *, activation_name: str = "gelu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        self.act = activation(activation_name)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))
