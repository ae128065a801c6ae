"""Softmax attention with a learned bias for every head and distance of rows and columns.

B batch, H heads, R and S rows and columns of the map, N = R · S, D head dim, C channels.

    o_i = Σ_j softmax_j(D^-½ q_i · k_j + b_h[|r_i - r_j|, |s_i - s_j|]) v_j

The attention of LeViT (2104.01136) as EfficientFormer has it (Li et al., 2206.01191): few numbers
in queries and keys, four times as many in values. Exact; O(N²), so it is meant for small maps. The
table b (H, R · S) is made for one size of map and resized along both distances for others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer

__all__ = [
    "DistanceAttention",
    "DistanceMixer",
    "distance_attention_reference",
    "distance_index",
    "resize_distances",
]


def distance_index(rows: int, columns: int, *, device: torch.device | None = None) -> Tensor:
    """Return the entry |Δrow| · columns + |Δcolumn| of every pair of places, (N, N) integers."""
    r = torch.arange(rows, device=device).repeat_interleave(columns)
    s = torch.arange(columns, device=device).repeat(rows)
    return (r[:, None] - r).abs() * columns + (s[:, None] - s).abs()


def resize_distances(table: Tensor, size: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return biases by distance (H, R · S) for maps of another size.

    Bilinear along both distances, in float32 at least; distance 0 stays distance 0 and the largest
    stays the largest, so that a wider map is read as the same picture in more places.

    Args:
        table: (H, R · S).
        size: R and S that it was made for.
        new: rows and columns to make it for; of the same size: the tensor itself.
    """
    if size == new:
        return table
    grid = table.unflatten(1, size)[None]
    wide = grid.to(torch.promote_types(table.dtype, torch.float32))
    resized = F.interpolate(wide, size=new, mode="bilinear", align_corners=True)
    return resized[0].flatten(1).to(table.dtype)


def distance_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, table: Tensor, *, grid: tuple[int, int]
) -> Tensor:
    """Return the definition's outputs (B, H, N, V), pair by pair of rows and columns.

    Args:
        query, key: (B, H, N, D), places row by row.
        value: (B, H, N, V).
        table: biases by distance (H, R · S).
        grid: R and S.
    """
    rows, columns = grid
    scores = query @ key.mT * query.shape[-1] ** -0.5
    for i in range(rows * columns):
        for j in range(rows * columns):
            down, right = abs(i // columns - j // columns), abs(i % columns - j % columns)
            scores[:, :, i, j] += table[:, down * columns + right]
    return scores.softmax(-1) @ value


class DistanceAttention(nn.Module):
    """Softmax attention with biases by distance on places of a map, as tokens (B, N, C).

    Args:
        dim: C.
        grid: rows and columns that the biases are made for; on other maps they are resized.
        num_heads: H.
        key_dim: D, numbers of a query and a key.
        value_ratio: numbers of a value over those of a key.
        dense_side: S of a second table, for S x S places, which is what is used then: the whole
            matrix (S², S²) is resized to (N, N) as a bicubic picture, as the authors' dense
            backbones have it. The first table then only carries weights.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        grid: tuple[int, int] = (7, 7),
        num_heads: int = 8,
        key_dim: int = 32,
        value_ratio: float = 4,
        dense_side: int | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_heads", num_heads), ("key_dim", key_dim), ("rows", grid[0]),
                           ("columns", grid[1])):  # fmt: skip
            if size < 1:
                raise ValueError(f"{name} {size} must be at least 1")
        self.num_heads, self.key_dim, self.grid = num_heads, key_dim, grid
        self.value_dim, self.dense_side = int(value_ratio * key_dim), dense_side
        self.qkv = nn.Linear(dim, num_heads * (2 * key_dim + self.value_dim))
        self.proj = nn.Linear(num_heads * self.value_dim, dim)
        table = torch.zeros(num_heads, grid[0] * grid[1])
        if dense_side is None:
            self.biases: Tensor = nn.Parameter(table)
        else:
            self.register_buffer("biases", table)
            self.dense_biases = nn.Parameter(torch.zeros(num_heads, dense_side**2))
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def bias(self, grid: tuple[int, int]) -> Tensor:
        """Return the biases of all pairs of places, (H, N, N), of a map of any size."""
        device = self.biases.device
        if self.dense_side is not None:
            count = grid[0] * grid[1]
            square = distance_index(self.dense_side, self.dense_side, device=device)
            whole = self.dense_biases[:, square]
            if whole.shape[1] == count:
                return whole
            return F.interpolate(whole[None], size=(count, count), mode="bicubic")[0]
        # Looked up on demand: a copy kept from earlier would outlive a change of the weights.
        table = resize_distances(self.biases, self.grid, grid)
        return table[:, distance_index(*grid, device=device)]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix tokens (B, N, C), the places of a map of ``grid`` rows and columns, row by row.

        Raises:
            ValueError: N is not rows times columns.
        """
        if not torch.compiler.is_compiling() and x.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"{x.shape[1]} tokens are no map of {grid[0]} x {grid[1]}: give the rows and "
                "columns that they come from"
            )
        sizes = [self.key_dim, self.key_dim, self.value_dim]
        # Queries, keys and values lie side by side within each head.
        q, k, v = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2).split(sizes, 3)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(grid).to(q.dtype))
        return self.proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"grid={self.grid}, num_heads={self.num_heads}, key_dim={self.key_dim}"


class DistanceMixer(DistanceAttention):
    """:class:`DistanceAttention` on a map (B, C, H, W), of any size.

    Example:
        >>> DistanceMixer(24, grid=(7, 5), num_heads=3)(torch.randn(2, 24, 7, 5)).shape
        torch.Size([2, 24, 7, 5])
    """

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Mix a map (B, C, H, W)."""
        rows, columns = x.shape[2:]
        out = super().forward(x.flatten(2).mT, (rows, columns))
        return out.mT.reshape(x.shape)


def _build(dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any) -> nn.Module:
    check_options("distance", options, "grid", "num_heads", "key_dim", "value_ratio")
    rows, columns = options.pop("grid", None) or grid or (7, 7)
    return DistanceMixer(dim, grid=(rows, columns), **({"num_heads": num_heads} | options))


def _flops(s: GridShape) -> int:
    keys, values = 32 * s.num_heads, 128 * s.num_heads
    projections = s.dim * (2 * keys + 2 * values)
    return 2 * s.batch * s.tokens * (projections + s.tokens * (keys + values))


register_mixer(
    Mixer(
        name="distance",
        summary="softmax attention with a learned bias by head and distance; for small maps",
        paper="efficientformer",
        build=_build,
        any_size=True,
        cost="O(N² C)",
        flops=_flops,
        extra=lambda s: (s.num_heads + 2) * s.tokens**2,  # the biases, and their places as int64
        notes=("biases are made for one size of map and resized for others",),
    )
)
