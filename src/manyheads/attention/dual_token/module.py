"""The token module, the local encoder and both together; a reconstruction.

B batch, C channels, H and W rows and columns, N = H · W, G side of the grid of global tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer

__all__ = [
    "ConvEncoder",
    "DualTokenAttention",
    "DualTokenMixer",
    "TokenModule",
    "TokenParts",
    "halvings",
]

_EPS = 1e-6


class TokenParts(NamedTuple):
    """What the token module makes on its way.

    Attributes:
        x_ds: (B, G², C), the map averaged down.
        x_ga: (B, G², C), after attention among its cells.
        g_new: (B, G², C), the new global tokens.
        x_global: (B, H, W, C), what every place reads from them.
    """

    x_ds: Tensor
    x_ga: Tensor
    g_new: Tensor
    x_global: Tensor


def halvings(size: tuple[int, int], grid: int) -> int:
    """Return how often a map of ``size`` can be halved before a side falls below ``grid``."""
    return max(0, int(math.log2(max(min(size) / grid, 1))))


class ConvEncoder(nn.Module):
    """y + W2 gelu(W1 LN(depthwise k x k (y))) on maps (B, H, W, C): local tokens."""

    def __init__(self, dim: int, *, kernel: int = 7, ratio: float = 4, eps: float = _EPS) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel {kernel} must be odd, so that a window has a middle")
        self.dw = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.pw1 = nn.Linear(dim, int(dim * ratio))
        self.pw2 = nn.Linear(int(dim * ratio), dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.pw2(F.gelu(self.pw1(self.norm(y))))


class TokenModule(nn.Module):
    """The position-aware token module: global tokens are renewed and read, on a map (B, H, W, C).

    Args:
        dim: C.
        num_heads: of both attentions.
        grid: G.
        steps: halvings of the map on its way to G x G, with a depthwise 3 x 3 convolution between
            each two; what is left over is done by adaptive average pooling.
        alpha: a, weight of the old global tokens.
        mix: the MLP mixes tokens ("MixMLP") instead of channels.
        g_mlp_ratio: its hidden width.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or ``alpha`` is no weight.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid: int = 7,
        steps: int = 0,
        alpha: float = 0.5,
        mix: bool = True,
        g_mlp_ratio: float = 1,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha {alpha} must lie in [0, 1]: the weight of the old tokens")
        if grid < 1 or steps < 0:
            raise ValueError(f"grid {grid} must be at least 1 and steps {steps} at least 0")
        self.num_heads, self.grid, self.steps = num_heads, grid, steps
        self.alpha, self.mix = alpha, mix
        self.down = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(steps - 1)
        )
        self.ga_qkv = nn.Linear(dim, 3 * dim)
        self.ga_proj = nn.Linear(dim, dim)
        self.g_norm = nn.LayerNorm(dim, eps=_EPS)
        width = grid * grid if mix else dim
        self.g_fc1 = nn.Linear(width, int(width * g_mlp_ratio))
        self.g_fc2 = nn.Linear(int(width * g_mlp_ratio), width)
        self.gb_q = nn.Linear(dim, dim)
        self.gb_kv = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, g: Tensor) -> TokenParts:
        """Renew global tokens (B, G², C) from a map (B, H, W, C), and read them.

        Raises:
            ValueError: another number of global tokens than G².
        """
        if not torch.compiler.is_compiling() and g.shape[1] != self.grid**2:
            raise ValueError(
                f"{g.shape[1]} global tokens, the module has {self.grid} x {self.grid} cells: give "
                f"(batch, {self.grid**2}, channels), or build it with another grid"
            )
        x_ds = self.summary(x)
        x_ga = self.ga_proj(self._attend(*self.ga_qkv(x_ds).chunk(3, -1)))
        g = self.alpha * g + (1 - self.alpha) * x_ga
        g_new = g + self._mlp(self.g_norm(g))
        key, value = self.gb_kv(g_new).chunk(2, -1)
        query = self.gb_q(x)
        x_global = self._attend(query.flatten(1, 2), key, value).view(x.shape)
        return TokenParts(x_ds, x_ga, g_new, x_global)

    def summary(self, x: Tensor) -> Tensor:
        """Average a map (B, H, W, C) down to (B, G², C), by steps."""
        y = x.permute(0, 3, 1, 2)
        for step in range(self.steps):
            if step:
                y = self.down[step - 1](y)
            y = F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False)
        if tuple(y.shape[2:]) != (self.grid, self.grid):
            y = F.adaptive_avg_pool2d(y, self.grid)
        return y.flatten(2).mT

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (query, key, value)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _mlp(self, g: Tensor) -> Tensor:
        if self.mix:
            return self.g_fc2(F.gelu(self.g_fc1(g.mT))).mT
        return self.g_fc2(F.gelu(self.g_fc1(g)))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, steps={self.steps}, alpha={self.alpha}, mix={self.mix}"


class DualTokenAttention(nn.Module):
    """Local and global tokens of a normed map, fused: the attention of a dual token block.

    Args:
        dim, num_heads: as in :class:`TokenModule`, with its further options.
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        self.conv = ConvEncoder(dim)
        self.token = TokenModule(dim, num_heads, **options)
        self.fuse = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed map and new tokens of a map (B, H, W, C) and tokens (B, G², C)."""
        return fused(self.conv, self.token, self.fuse, x, g)


def fused(
    conv: nn.Module, token: nn.Module, fuse: nn.Module, x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the three parts; blocks that hold them under their own names call this."""
    local = conv(x)
    parts = token(local, g)
    return fuse(torch.cat((local, parts.x_global), -1)), parts.g_new


class DualTokenMixer(nn.Module):
    """:class:`DualTokenAttention` on maps (B, C, H, W) with learned global tokens of its own.

    In DualToken-ViT the tokens travel from block to block; a mixer stands alone, so its tokens
    start anew.
    """

    def __init__(self, dim: int, num_heads: int, *, grid: int = 7, **options: Any) -> None:
        super().__init__()
        self.attention = DualTokenAttention(dim, num_heads, grid=grid, **options)
        self.global_token = nn.Parameter(torch.zeros(1, grid * grid, dim))
        nn.init.trunc_normal_(self.global_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        tokens = self.global_token.to(x).expand(x.shape[0], -1, -1)
        return self.attention(x.permute(0, 2, 3, 1), tokens)[0].permute(0, 3, 1, 2)


def _build(dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any) -> nn.Module:
    check_options("dual_token", options, "grid", "steps", "alpha", "mix", "g_mlp_ratio")
    if "steps" not in options and grid is not None:
        options["steps"] = halvings(grid, options.get("grid", 7))
    return DualTokenMixer(dim, num_heads, **options)


def _flops(s: GridShape) -> int:
    cells, steps, c = 49, halvings((s.height, s.width), 7), s.dim
    local = s.tokens * (49 * c + 8 * c * c)
    down = sum(9 * c * -(-s.height // 2**k) * -(-s.width // 2**k) for k in range(1, steps))
    summary = cells * 4 * c * c + 2 * cells * cells * c + 2 * cells * cells * c
    read = s.tokens * (c * c + 2 * cells * c) + cells * 2 * c * c
    return 2 * s.batch * (local + down + summary + read + 2 * s.tokens * c * c)


register_mixer(
    Mixer(
        name="dual_token",
        summary="a 7 x 7 convolution, and attention to 7 x 7 tokens that summarise the map",
        paper="dualtoken",
        build=_build,
        any_size=True,
        cost="O(N C (C + G²))",
        flops=_flops,
        notes=(
            "an independent reconstruction: no code was published",
            "as a mixer it has global tokens of its own, which do not travel between blocks",
        ),
    )
)
