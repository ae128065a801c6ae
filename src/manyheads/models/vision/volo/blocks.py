"""Blocks of VOLO on channels-last maps (2106.13112).

B batch, H and W rows and columns, N = H · W, C channels, n heads, d = C / n.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from manyheads.attention.grid.outlook import OutlookAttention
from manyheads.layers.drop_path import DropPath
from manyheads.layers.mlp import MLP
from manyheads.models.vision.volo.config import VOLOConfig

__all__ = [
    "Block",
    "ClassAttention",
    "ClassBlock",
    "Downsample",
    "PatchEmbed",
    "TokenAttention",
    "make_stage",
]


class PatchEmbed(nn.Module):
    """Images (B, channels, 8 H, 8 W) to a map (B, H, W, C): three convolutions, then patches."""

    def __init__(self, in_channels: int, hidden: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for source, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [
                nn.Conv2d(source, hidden, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(hidden),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, dim, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.conv(x)).permute(0, 2, 3, 1)

    def fold(self) -> None:
        """Fold the batch norms into the convolutions, in place: for inference alone."""
        for i in (0, 3, 6):
            conv, norm = cast(nn.Conv2d, self.conv[i]), cast(nn.BatchNorm2d, self.conv[i + 1])
            self.conv[i], self.conv[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()


class Downsample(nn.Module):
    """A map (B, 2 H, 2 W, C) to (B, H, W, C'): a convolution of 2 x 2 places."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TokenAttention(nn.Module):
    """Softmax attention among all places of a map (B, H, W, C). O(N² C)."""

    def __init__(
        self, dim: int, *, num_heads: int, qkv_bias: bool = False, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n, N, d) each
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """x += attn(norm1(x)); x += mlp(norm2(x)) on a map (B, H, W, C).

    Args:
        dim: C.
        attn: :class:`OutlookAttention` or :class:`TokenAttention`.
        mlp_ratio: hidden width of the MLP over C.
        drop_path: rate of stochastic depth of both branches.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, mlp_ratio: float = 3, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def fold(self) -> None:
        """Fold what can be folded, in place: for inference alone."""
        if isinstance(self.attn, OutlookAttention):
            self.attn.fold()


class ClassAttention(nn.Module):
    """The first of N + 1 tokens reads all of them: (B, N + 1, C) to (B, 1, C).

    With one query no key and no value has to be made: a head's scores are x (Wkᵀ q) and its
    output Wv (a x), two products with vectors instead of 2 N C² multiply-adds. ``is_short`` turns
    that on; equal up to rounding.
    """

    def __init__(
        self, dim: int, *, num_heads: int, qkv_bias: bool = False, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.is_short = num_heads, False
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attention_dropout = nn.Dropout(attention_dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = (self.num_heads, x.shape[2] // self.num_heads)
        q = self.q(x[:, :1]).unflatten(2, heads).transpose(1, 2) * heads[1] ** -0.5  # (B, n, 1, d)
        if self.is_short:
            return self.proj(self._short(q, x).flatten(1)[:, None])
        k, v = self.kv(x).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        shares = self.attention_dropout((q @ k.mT).softmax(-1))
        return self.proj((shares @ v).transpose(1, 2).flatten(2))

    def _short(self, q: Tensor, x: Tensor) -> Tensor:
        """Return what the heads read (B, n, d)."""
        weight = self.kv.weight.view(2, *q.shape[1::2], x.shape[2])  # (2, n, d, C)
        # A bias of the keys moves all scores of a head alike, and softmax does not see it.
        query = torch.einsum("bnd,ndc->bnc", q[:, :, 0], weight[0])
        shares = self.attention_dropout((query @ x.mT).softmax(-1))  # (B, n, N + 1)
        out = torch.einsum("bnc,ndc->bnd", shares @ x, weight[1])
        if self.kv.bias is not None:
            bias = self.kv.bias.view(2, *q.shape[1::2])[1]
            out = out + bias * shares.sum(-1, keepdim=True)
        return out


class ClassBlock(nn.Module):
    """One block of class attention: of (B, N + 1, C) the first token alone is changed."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 3,
        qkv_bias: bool = False,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ClassAttention(
            dim, num_heads=num_heads, qkv_bias=qkv_bias, attention_dropout=attention_dropout
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        first = first + self.attn(self.norm1(x))
        first = first + self.mlp(self.norm2(first))
        return torch.cat((first, x[:, 1:]), 1)

    def fold(self) -> None:
        """Make neither keys nor values any more, in place."""
        self.attn.is_short = True


def make_stage(c: VOLOConfig, index: int) -> nn.Sequential:
    """Return the blocks of a stage; the first stage is of outlookers."""
    dim, heads = c.embed_dims[index], c.num_heads[index]
    total, before = sum(c.depths), sum(c.depths[:index])
    shared: dict[str, Any] = {"qkv_bias": c.qkv_bias, "attention_dropout": c.attention_dropout}
    rate = c.drop_path if index or c.outlook_drop_path else 0.0

    def attention() -> nn.Module:
        if index:
            return TokenAttention(dim, num_heads=heads, **shared)
        return OutlookAttention(
            dim, num_heads=heads, kernel_size=c.kernel_size, stride=c.stride, **shared
        )

    return nn.Sequential(
        *(
            Block(
                dim,
                attention(),
                mlp_ratio=c.mlp_ratios[index],
                drop_path=rate * (before + j) / max(total - 1, 1),
            )
            for j in range(c.depths[index])
        )
    )
