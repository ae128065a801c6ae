"""The block of Orchid's encoders: mixer and block-diagonal MLP, each behind a norm (2402.18508).

B batch, N length, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from manyheads.attention.orchid import OrchidAttention, OrchidConfig
from manyheads.attention.orchid.network import StaticFilter
from manyheads.layers.activations import activation
from manyheads.layers.block_linear import BlockLinear
from manyheads.layers.drop_path import DropPath

__all__ = ["OrchidBlock", "initialise"]


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, *, blocks: int, gated: bool, act: str) -> None:
        super().__init__()
        self.gate_proj = _linear(dim, hidden, blocks) if gated else None
        self.up_proj = _linear(dim, hidden, blocks)
        self.down_proj = _linear(hidden, dim, blocks)
        self.act = activation(act)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        up = self.act(up) if self.gate_proj is None else self.act(self.gate_proj(x)) * up
        return self.down_proj(up)


def _linear(ins: int, outs: int, blocks: int) -> nn.Module:
    return nn.Linear(ins, outs) if blocks == 1 else BlockLinear(ins, outs, blocks=blocks)


class OrchidBlock(nn.Module):
    """x += orchid(norm(x)); x += mlp(norm(x)), the MLP's matrices block-diagonal. Looks ahead.

    Args:
        mixer: config of the mixing layer, which says the width too.
        mlp_width: hidden width of the MLP.
        mlp_blocks: blocks of its matrices; 1 for dense ones.
        gated_mlp, activation, dropout, drop_path, norm_eps: as in ``OrchidEncoderConfig``.
    """

    def __init__(
        self,
        mixer: OrchidConfig,
        mlp_width: int,
        *,
        mlp_blocks: int = 4,
        gated_mlp: bool = False,
        activation: str = "gelu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        dim = mixer.embed_dim
        self.mixer_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mixer = OrchidAttention(mixer)
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = _MLP(dim, mlp_width, blocks=mlp_blocks, gated=gated_mlp, act=activation)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Take (B, N, C) to (B, N, C); other arguments as in the layer."""
        mixed = self.mixer(self.mixer_norm(x), mask=mask, cu_seqlens=cu_seqlens)
        x = x + self.drop_path(self.dropout(mixed))
        return x + self.drop_path(self.dropout(self.mlp(self.mlp_norm(x))))


def initialise(model: nn.Module, std: float) -> None:
    """Give all matrices but those of the static filters N(0, std), and zero biases."""
    inside = {m for f in model.modules() if isinstance(f, StaticFilter) for m in f.modules()}
    for module in model.modules():
        if isinstance(module, nn.Linear | BlockLinear | nn.Embedding) and module not in inside:
            nn.init.normal_(module.weight, std=std)
            if not isinstance(module, nn.Embedding) and module.bias is not None:
                nn.init.zeros_(module.bias)
