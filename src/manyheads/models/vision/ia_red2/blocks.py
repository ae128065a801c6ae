"""The blocks of DeiT, and of TimeSformer: tokens that are gone are keys of none.

B batch, N tokens (the class token first), C channels, T frames, S places of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.drop_path import DropPath
from manyheads.layers.mlp import MLP

__all__ = ["Attention", "Block", "DividedBlock", "PatchEmbed"]


class PatchEmbed(nn.Module):
    """A strided convolution: images (B, channels, H, W) to a map (B, C, H / p, W / p)."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            for name, side in (("height", x.shape[2]), ("width", x.shape[3])):
                if side < self.patch or side % self.patch:
                    raise ValueError(
                        f"{name} {side} is not a positive multiple of the patch {self.patch}: pad "
                        "or resize the images"
                    )
        return self.proj(x)


class Attention(nn.Module):
    """Softmax attention among tokens (B, N, C).

    With ``keep`` (B, N), others are no keys, and their own rows of the mix are 0 before the
    output projection, as in the released code.
    """

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None
        if keep is not None:
            # Finite: a row without any key must not become NaN, it is zeroed below.
            least = torch.finfo(q.dtype).min / 2
            bias = q.new_zeros(keep.shape).masked_fill(~keep, least)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        if keep is not None:
            out = torch.where(keep[..., None], out, 0)
        return self.dropout(self.proj(out))


class Block(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)), on tokens (B, N, C)."""

    takes_keep = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), keep))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DividedBlock(Block):
    """TimeSformer's block: attention along time, then within each frame, then the MLP.

    Tokens are (B, 1 + S · T, C), the class token first, a place's frames next to each other, as
    in the official code. The class token takes part within every frame, and the mean of what the
    frames give is added to it. Bertasius et al., 2102.05095.

    The grid has to stay whole, so tokens that are gone are masked on either axis: this saves
    nothing, unlike joint attention.

    Args:
        dim, num_heads, mlp_ratio, qkv_bias, dropout, drop_path, norm_eps: as in :class:`Block`.
        frames: T.
    """

    def __init__(self, dim: int, num_heads: int, *, frames: int, **options: float) -> None:
        super().__init__(dim, num_heads, **options)  # type: ignore[arg-type]
        self.frames = frames
        self.temporal_norm1 = nn.LayerNorm(dim, eps=options.get("norm_eps", 1e-6))
        self.temporal_attn = Attention(
            dim,
            num_heads,
            qkv_bias=bool(options.get("qkv_bias", True)),
            dropout=options.get("dropout", 0.0),
        )
        self.temporal_fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        batch, frames = x.shape[0], self.frames
        cls, rest = x[:, :1], x[:, 1:]
        line = rest.unflatten(1, (-1, frames)).flatten(0, 1)  # (B · S, T, C)
        alive = None if keep is None else keep[:, 1:].unflatten(1, (-1, frames))  # (B, S, T)
        along = None if alive is None else alive.flatten(0, 1)
        moved = self.drop_path(self.temporal_attn(self.temporal_norm1(line), along))
        rest = rest + self.temporal_fc(moved).unflatten(0, (batch, -1)).flatten(1, 2)

        grid = rest.unflatten(1, (-1, frames)).transpose(1, 2)  # (B, T, S, C)
        head = cls[:, None].expand(-1, frames, -1, -1)
        frame = torch.cat((head, grid), 2).flatten(0, 1)  # (B · T, 1 + S, C)
        within = None
        if alive is not None:
            within = F.pad(alive.transpose(1, 2), (1, 0), value=True).flatten(0, 1)
        mixed = self.drop_path(self.attn(self.norm1(frame), within)).unflatten(0, (batch, frames))
        cls = cls + mixed[:, :, 0].mean(1, keepdim=True)
        x = torch.cat((cls, rest + mixed[:, :, 1:].transpose(1, 2).flatten(1, 2)), 1)
        return x + self.drop_path(self.mlp(self.norm2(x)))
