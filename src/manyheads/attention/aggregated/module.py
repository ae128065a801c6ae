"""Modules: aggregated attention and length-scaled cosine attention on maps (B, C, H, W)."""

from __future__ import annotations

import math
from operator import index
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.aggregated.op import IMPLEMENTATIONS, aggregated
from manyheads.attention.aggregated.position import (
    position_bias,
    position_bias_reference,
    resized_bias,
)
from manyheads.errors import unknown_name
from manyheads.layers.packed import PackedLinear

__all__ = ["AggregatedAttention", "LengthScaledAttention", "PositionMode"]

PositionMode = Literal["extrapolation", "interpolation"]
_HIDDEN = 512
# softplus of this is 1 / 0.24, the first scale of the cosines.
_TEMPERATURE = math.log(math.expm1(1 / 0.24))


class _CosineAttention(nn.Module):
    """What both have: a temperature, a query embedding, an MLP for positions."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        pretrain_grid: tuple[int, int] | None,
        grid: tuple[int, int] | None,
        positions: str,
        dropout: float,
        proj_dropout: float,
        implementation: str,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if positions not in ("extrapolation", "interpolation"):
            raise unknown_name("positions", positions, ("extrapolation", "interpolation"))
        if positions == "interpolation" and grid is None:
            raise ValueError("positions='interpolation' needs grid=(rows, columns) to start from")
        if pretrain_grid is not None and min(pretrain_grid) < 2:
            raise ValueError(
                f"pretrain_grid {pretrain_grid}: distances are divided by one less than its sides, "
                "so both must be at least 2"
            )
        if implementation not in IMPLEMENTATIONS:
            raise unknown_name("implementation", implementation, IMPLEMENTATIONS)
        self.implementation = implementation
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.pretrain_grid, self.grid, self.positions = pretrain_grid, grid, positions
        self.dropout = dropout
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), _TEMPERATURE))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.proj: nn.Linear | PackedLinear = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(proj_dropout)
        self.cpb_fc1 = nn.Linear(2, _HIDDEN)
        self.cpb_fc2 = nn.Linear(_HIDDEN, num_heads)
        self._kept: dict[tuple[object, ...], Tensor] | None = None

    def freeze(self) -> None:
        """Keep the position bias of every size from its first use on, and pack weights: for
        inference alone."""
        self._kept = {}
        self._pack()

    def _pack(self) -> None:
        raise NotImplementedError

    def pooled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the keys that have a position bias."""
        return size

    def position_bias(self, height: int, width: int) -> Tensor:
        """Return the bias of H · W queries and P pooled keys, (heads, P, N)."""
        if self._kept is None or torch.compiler.is_compiling():
            return self._position_bias((height, width))
        weight = self.cpb_fc1.weight
        key = (height, width, weight.device, weight.dtype)
        if key not in self._kept:
            self._kept[key] = self._position_bias((height, width))
        return self._kept[key]

    def _position_bias(self, size: tuple[int, int]) -> Tensor:
        start = size
        if self.positions == "interpolation" and self.grid is not None:
            start = self.grid
        pooled = self.pooled_size(start)
        make = position_bias_reference if self.implementation == "reference" else position_bias
        bias = make(self.cpb_fc1, self.cpb_fc2, start, pooled, self.pretrain_grid)
        return resized_bias(bias, start, pooled, size, self.pooled_size(size))

    def scale(self) -> Tensor:
        """Return the scale of the cosines, (heads, 1, 1); the log of the length is not in it."""
        return F.softplus(self.temperature)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, positions={self.positions!r}, grid={self.grid}, "
            f"pretrain_grid={self.pretrain_grid}"
        )


class AggregatedAttention(_CosineAttention):
    """A window around each place and a pooled view of the whole map, under one softmax.

    Needs training. Takes maps of any size. See :func:`aggregated` for the formula.

    Args:
        dim: C.
        num_heads: h.
        window_size: w, odd.
        sr_ratio: the pooled map is (H // sr_ratio, W // sr_ratio), at least 1 x 1.
        fixed_pool_size: side of the pooled map whatever the size: cost is then linear in N.
        pretrain_grid: rows and columns of the map that training started with, which position
            coordinates are measured by; None: the map's own.
        grid: rows and columns that the position bias is made for, in the mode "interpolation".
        positions: for maps of another size, "extrapolation" (the bias is computed for the size)
            or "interpolation" (the bias of ``grid`` is resized).
        pixel_focused: without query embedding, learned tokens and their bias.
        qkv_bias: of the projections of queries, keys and values.
        dropout, proj_dropout: rates, on the weights and on the output.
        implementation: as in :func:`aggregated`.

    Raises:
        ValueError: sizes that do not fit, named; in ``forward``, a map whose shorter side is not
            above ``fixed_pool_size``.

    Example:
        >>> AggregatedAttention(48, num_heads=2, sr_ratio=4)(torch.randn(1, 48, 9, 14)).shape
        torch.Size([1, 48, 9, 14])
    """

    query_embedding: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window_size: int = 3,
        sr_ratio: int = 8,
        fixed_pool_size: int | None = None,
        pretrain_grid: tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
        positions: PositionMode = "extrapolation",
        pixel_focused: bool = False,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads, pretrain_grid, grid, positions, dropout, proj_dropout, implementation
        )
        if window_size < 1 or window_size % 2 == 0:
            raise ValueError(f"window_size {window_size} must be odd, so that it has a middle")
        if sr_ratio < 1:
            raise ValueError(f"sr_ratio {sr_ratio} must be at least 1")
        if fixed_pool_size is not None and fixed_pool_size < 1:
            raise ValueError(f"fixed_pool_size {fixed_pool_size} must be at least 1, or None")
        self.window_size, self.sr_ratio = window_size, sr_ratio
        self.fixed_pool_size = fixed_pool_size
        cells = window_size**2
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr: nn.Conv2d | PackedLinear = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, cells))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        self.learnable_tokens: nn.Parameter | None
        self.learnable_bias: nn.Parameter | None
        if pixel_focused:
            for name in ("query_embedding", "learnable_tokens", "learnable_bias"):
                self.register_parameter(name, None)
        else:
            self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, cells))
            nn.init.trunc_normal_(self.learnable_tokens, std=0.02)
            self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, cells))

    def _pack(self) -> None:
        # Only here: the others' results or inputs have places last, which packed weights do not.
        if isinstance(self.sr, nn.Conv2d):
            self.sr = PackedLinear(self.sr, gelu=True)

    def pooled_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns of the pooled map of a map of ``size``.

        Raises:
            ValueError: a side that is not above ``fixed_pool_size``.
        """
        fixed = self.fixed_pool_size
        if fixed is None:
            return max(size[0] // self.sr_ratio, 1), max(size[1] // self.sr_ratio, 1)
        if fixed >= min(size):
            raise ValueError(
                f"fixed_pool_size {fixed} must be below the map's shorter side, {min(size)}: give "
                "a smaller one, or larger images"
            )
        return fixed, fixed

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W); channels-last memory is read without a copy."""
        batch, dim = x.shape[:2]
        # Tables are made for one size: a tracer that leaves it open only gets slow.
        size = (index(x.shape[2]), index(x.shape[3]))
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C)
        q = _places_last(self.q, tokens).unflatten(1, (self.num_heads, self.head_dim))
        k, v = (
            _places_last(self.kv, tokens).unflatten(1, (2, self.num_heads, self.head_dim)).unbind(1)
        )
        pooled = self._pool(tokens, size)
        far = self.kv(pooled).unflatten(2, (2, self.num_heads, self.head_dim))
        far_k, far_v = far.permute(2, 0, 3, 1, 4)  # (B, h, P, D) each
        out = aggregated(
            q.mT,
            k.mT,
            v.mT,
            far_k,
            far_v,
            size=size,
            window_size=self.window_size,
            scale=self.scale(),
            local_bias=self.relative_pos_bias_local,
            pooled_bias=self.position_bias(*size).mT,
            query_embedding=self.query_embedding,
            tokens=self.learnable_tokens,
            token_bias=self.learnable_bias,
            dropout=self.dropout if self.training else 0.0,
            implementation=self.implementation,
        )
        out = out.transpose(2, 3).reshape(batch, dim, -1).mT  # (B, N, C), places last in memory
        out = self.proj_dropout(self.proj(out))
        return out.unflatten(1, size).permute(0, 3, 1, 2)

    def _pool(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the pooled map's tokens (B, P, C)."""
        if isinstance(self.sr, PackedLinear):
            mixed = self.sr(tokens)
        else:
            mixed = F.gelu(F.linear(tokens, self.sr.weight.flatten(1), self.sr.bias))
        rows, columns = self.pooled_size(size)
        mapped = mixed.unflatten(1, size).permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(mapped, (rows, columns))
        return self.norm(pooled.flatten(2).mT)


class LengthScaledAttention(_CosineAttention):
    """Cosine attention among all places of a map, scaled by the log of their number. O(N² C).

    Needs training; takes maps of any size. S = ((q̂ + QE) · scale · log(N)) · k̂ + bias.

    Args:
        dim: C.
        num_heads, pretrain_grid, grid, positions, qkv_bias, dropout, proj_dropout: as in
            :class:`AggregatedAttention`.
        implementation: "reference" makes the position bias as it is defined.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        pretrain_grid: tuple[int, int] | None = None,
        grid: tuple[int, int] | None = None,
        positions: PositionMode = "extrapolation",
        qkv_bias: bool = True,
        dropout: float = 0.0,
        proj_dropout: float = 0.0,
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            dim, num_heads, pretrain_grid, grid, positions, dropout, proj_dropout, implementation
        )
        self.qkv: nn.Linear | PackedLinear = nn.Linear(dim, 3 * dim, bias=qkv_bias)

    def _pack(self) -> None:
        if isinstance(self.qkv, nn.Linear) and isinstance(self.proj, nn.Linear):
            self.qkv, self.proj = PackedLinear(self.qkv), PackedLinear(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        height, width = index(x.shape[2]), index(x.shape[3])
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        q, k, v = (
            self.qkv(tokens).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        )
        wide = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
        q, k = (F.normalize(t.to(wide), dim=-1) for t in (q, k))
        q = (q + self.query_embedding) * (self.scale() * math.log(height * width))
        bias = self.position_bias(height, width).mT.to(wide)
        out = F.scaled_dot_product_attention(
            q.to(wide), k, v.to(wide), bias, self.dropout if self.training else 0.0, scale=1.0
        ).to(v.dtype)
        out = self.proj_dropout(self.proj(out.transpose(1, 2).flatten(2)))
        return out.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _places_last(linear: nn.Linear, tokens: Tensor) -> Tensor:
    """Return a linear map of tokens (B, N, C) as (B, C', N), in that order in memory."""
    weight = linear.weight.expand(len(tokens), -1, -1)
    if linear.bias is None:
        return weight @ tokens.mT
    return torch.baddbmm(linear.bias[:, None], weight, tokens.mT)
