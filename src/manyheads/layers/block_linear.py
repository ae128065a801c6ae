"""Block-diagonal linear maps. C_in and C_out channels in G blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BlockLinear"]


class BlockLinear(nn.Module):
    """A linear map whose matrix has G blocks on its diagonal and zeros elsewhere.

    1/G of the parameters and of the products of a dense one; channels of different blocks do not
    meet here.

    Args:
        in_features, out_features: C_in, C_out, multiples of ``blocks``.
        blocks: G.
        bias: whether there is one.

    Raises:
        ValueError: a width that is no multiple of ``blocks``.
    """

    def __init__(
        self, in_features: int, out_features: int, *, blocks: int = 4, bias: bool = True
    ) -> None:
        super().__init__()
        for name, width in (("in_features", in_features), ("out_features", out_features)):
            if blocks < 1 or width % blocks:
                raise ValueError(f"{name} {width} is not a multiple of blocks {blocks}")
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.weight = nn.Parameter(
            torch.empty(blocks, out_features // blocks, in_features // blocks)
        )
        bound = (in_features // blocks) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C_in) to (..., C_out)."""
        parts = x.reshape(-1, self.blocks, self.in_features // self.blocks).transpose(0, 1)
        y = torch.bmm(parts, self.weight.mT).transpose(0, 1)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, blocks={self.blocks}"
