"""Token mixers of the MetaFormer paper: pooling, identity, attention, spatial FC (2111.11418).

B batch, C channels, H and W rows and columns, N = H · W, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer
from manyheads.errors import nearest

__all__ = ["GridAttention", "IdentityMixer", "Pooling", "SpatialFC", "check_options"]


def check_options(name: str, options: dict[str, Any], *known: str) -> None:
    """Raise ValueError for an option that a mixer does not have."""
    for key in options:
        if key not in known:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ValueError(f"mixer {name!r} has no option {key!r}{nearest(key, known)}; {has}")


class Pooling(nn.Module):
    """Average pooling minus identity: PoolFormer's mixer, without parameters. O(k² N C).

    Zeros beyond the border are not counted in the mean. The input is subtracted because the block
    adds it again.
    """

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        if pool_size < 1 or pool_size % 2 == 0:
            raise ValueError(f"pool_size {pool_size} must be odd, so that a window has a middle")
        self.pool_size = pool_size

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        size = self.pool_size
        pooled = F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)
        return pooled - x

    def extra_repr(self) -> str:
        return f"pool_size={self.pool_size}"


class IdentityMixer(nn.Module):
    """No mixing at all: what a MetaFormer does without."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the map (B, C, H, W)."""
        return x


class GridAttention(nn.Module):
    """Softmax attention among all places of a map. O(N² C).

    Args:
        dim: C.
        head_dim: D; C / D heads.
        qkv_bias: of the joint projection of queries, keys and values.

    Raises:
        ValueError: ``dim`` is not a multiple of ``head_dim``.
    """

    def __init__(self, dim: int, *, head_dim: int = 32, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"dim {dim} is not a multiple of head_dim {head_dim}")
        self.num_heads = dim // head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        batch, dim, height, width = x.shape
        tokens = x.flatten(2).mT  # (B, N, C)
        q, k, v = (
            self.qkv(tokens)
            .unflatten(2, (3, self.num_heads, dim // self.num_heads))
            .permute(2, 0, 3, 1, 4)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out.mT.reshape(batch, dim, height, width)


class SpatialFC(nn.Module):
    """One matrix over the places of a map, shared by all channels; fixes the size. O(N² C).

    Args:
        grid: rows and columns.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.fc = nn.Linear(grid[0] * grid[1], grid[0] * grid[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W).

        Raises:
            ValueError: the map has another size than the matrix.
        """
        if not torch.compiler.is_compiling() and tuple(x.shape[2:]) != self.grid:
            raise ValueError(
                f"the map is {x.shape[2]} x {x.shape[3]}, this spatial FC is made for "
                f"{self.grid[0]} x {self.grid[1]}: build the model with image_size= of your images"
            )
        return self.fc(x.flatten(2)).view(x.shape)


def _pool(dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any) -> nn.Module:
    check_options("pool", options, "pool_size")
    return Pooling(**options)


def _identity(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    check_options("identity", options)
    return IdentityMixer()


def _attention(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    check_options("attention", options, "head_dim", "qkv_bias")
    if "head_dim" not in options and dim % 32:
        options["head_dim"] = dim // num_heads
    return GridAttention(dim, **options)


def _spatial_fc(
    dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any
) -> nn.Module:
    check_options("spatial_fc", options, "grid")
    size = options.get("grid") or grid
    if size is None:
        raise ValueError("mixer 'spatial_fc' is made for a size: give grid=(rows, columns)")
    return SpatialFC(tuple(size))


def _attention_flops(s: GridShape) -> int:
    return s.batch * (8 * s.tokens * s.dim**2 + 4 * s.tokens**2 * s.dim)


register_mixer(
    Mixer(
        name="pool",
        summary="mean of 3 x 3 neighbours less the place itself; no parameters, nothing far",
        paper="metaformer",
        build=_pool,
        any_size=True,
        cost="O(k² N C)",
        flops=lambda s: 0,
    )
)
register_mixer(
    Mixer(
        name="identity",
        summary="no mixing: what a block's MLP does alone",
        paper="metaformer",
        build=_identity,
        any_size=True,
        cost="O(1)",
        flops=lambda s: 0,
    )
)
register_mixer(
    Mixer(
        name="attention",
        summary="softmax attention among all places of a map, heads of 32",
        paper="metaformer",
        build=_attention,
        any_size=True,
        cost="O(N² C)",
        flops=_attention_flops,
    )
)
register_mixer(
    Mixer(
        name="spatial_fc",
        summary="one learned N x N matrix for all channels; maps of one size alone",
        paper="metaformer",
        build=_spatial_fc,
        any_size=False,
        cost="O(N² C)",
        flops=lambda s: 2 * s.batch * s.tokens**2 * s.dim,
    )
)
