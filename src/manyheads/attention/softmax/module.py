"""The softmax layer: projections, optional rotary positions, grouped key-value heads.

B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.softmax.op import SoftmaxState, softmax, softmax_update
from manyheads.config import Config
from manyheads.layers.cache import KeptCache
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename, split
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_cu_seqlens, check_mask, positions, sequence_ids
from manyheads.layers.rotary import apply_rotary, rotary_angles

__all__ = ["SoftmaxAttention", "SoftmaxConfig", "SoftmaxLayerState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftmaxConfig(Config):
    """Sizes and options of a softmax attention layer.

    Attributes:
        embed_dim: C.
        num_heads: query heads.
        num_kv_heads: key-value heads (None: num_heads).
        head_dim: D (None: embed_dim / num_heads).
        is_causal: whether a token sees later ones.
        bias: whether the projections have biases.
        rotary_theta: base of the rotary embedding, None for no positions.
    """

    embed_dim: int
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    is_causal: bool = True
    bias: bool = False
    rotary_theta: float | None = 10000.0

    def __post_init__(self) -> None:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}: "
                "pass head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )

    @property
    def dim(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class SoftmaxLayerState(NamedTuple):
    """``cache``, whose ``length`` (B,) is also the position of each row's next token."""

    cache: SoftmaxState | KeptCache


class SoftmaxAttention(SequenceMixer):
    """Multi-head, grouped-query or multi-query softmax attention (1706.03762, 2305.13245).

    Example:
        >>> layer = SoftmaxAttention(SoftmaxConfig(embed_dim=64, num_heads=4, num_kv_heads=2))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "softmax"
    config: SoftmaxConfig

    def __init__(self, config: SoftmaxConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.embed_dim, c.num_heads * c.dim, bias=c.bias)
        self.k_proj = Linear(c.embed_dim, c.kv_heads * c.dim, bias=c.bias)
        self.v_proj = Linear(c.embed_dim, c.kv_heads * c.dim, bias=c.bias)
        self.out_proj = Linear(c.num_heads * c.dim, c.embed_dim, bias=c.bias)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
            ids = sequence_ids(cu_seqlens, x.shape[1])
            places = torch.arange(x.shape[1], device=x.device) - cu_seqlens[ids]
        else:
            places = positions(mask, x.shape[1], device=x.device)
        q, k, v = self._project(x, places)
        return self._output(self._attend(q, k, v, mask, cu_seqlens), x, mask, cu_seqlens)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SoftmaxLayerState:
        if not self.config.is_causal:
            return super().init_state(batch_size)
        c, weight = self.config, self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        empty = torch.zeros(batch_size, c.kv_heads, 0, c.dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        return SoftmaxLayerState(SoftmaxState(empty, empty, length))

    def update(
        self, x: Tensor, state: SoftmaxLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, SoftmaxLayerState]:
        if not self.config.is_causal:
            return super().update(x, state, mask=mask)
        mask = check_mask(mask, x.shape[0], x.shape[1])
        places = positions(mask, x.shape[1], device=x.device) + state.cache.length[:, None]
        q, k, v = self._project(x, places)
        cache = state.cache
        if isinstance(cache, KeptCache):

            def first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return self._attend(q, k, v, mask, None)

            out = cache.attend(q, k, v, mask, first=first, later=self._attend_kept)
        else:
            out, cache = self._attend_cache(cache, q, k, v, mask)
        return self._output(out, x, mask, None), SoftmaxLayerState(cache)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        causal = self.config.is_causal
        return softmax(q, k, v, is_causal=causal, mask=mask, cu_seqlens=cu_seqlens)

    def _attend_cache(
        self, cache: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        return softmax_update(cache, q, k, v, mask=mask)

    def _attend_kept(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        """Attend to what a cache kept, whose order says nothing; ``allowed`` None: to all."""
        return softmax(q, k, v, attn_mask=allowed)

    def _output(
        self, heads: Tensor, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """Join the heads (B, H, N, D); layers that read their input ``x`` again do it here."""
        return self.out_proj(merge_heads(heads))

    def _project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_heads)
        k = split_heads(self.k_proj(x), c.kv_heads)
        v = split_heads(self.v_proj(x), c.kv_heads)
        if c.rotary_theta is not None:
            cos, sin = rotary_angles(places, c.dim, theta=c.rotary_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q, k, v

    def key_map(self) -> KeyMap:
        """Names of torch.nn.MultiheadAttention with biases and no grouping, else LLaMA's."""
        c = self.config
        kinds = ("weight", "bias")
        if c.bias and c.kv_heads == c.num_heads:
            return KeyMap(
                *(split([f"{n}_proj.{k}" for n in "qkv"], f"in_proj_{k}") for k in kinds),
                *(rename(f"out_proj.{k}", f"out_proj.{k}") for k in kinds),
            )
        names = (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
        return KeyMap(*(rename(f"{a}_proj.{k}", f"{b}_proj.{k}") for a, b in names for k in kinds))
