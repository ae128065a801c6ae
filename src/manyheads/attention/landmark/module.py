"""The landmark layer. B batch, N length, C embed_dim, H heads, D head dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.landmark.definition import (
    BLOCK_SIZE,
    check_block_size,
    check_group_dropout,
)
from manyheads.attention.landmark.memory import LandmarkMemory
from manyheads.attention.landmark.op import LandmarkState, landmark, landmark_update
from manyheads.attention.landmark.recall import attend_with_memory
from manyheads.attention.softmax import SoftmaxAttention, SoftmaxConfig
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.ragged import check_cu_seqlens, check_mask, positions, sequence_ids
from manyheads.layers.rotary import apply_rotary, rotary_angles
from manyheads.layers.state import state_tensors

__all__ = ["LandmarkAttention", "LandmarkConfig", "LandmarkLayerState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandmarkConfig(SoftmaxConfig):
    """Sizes and options of a landmark attention layer, beside those of softmax attention.

    Attributes:
        block_size: tokens a block with its landmark.
        rotary_interleaved: whether the rotary embedding turns neighbouring channels.
        group_dropout: in training alone, the share of earlier blocks that a query leaves out.
    """

    block_size: int = BLOCK_SIZE
    rotary_interleaved: bool = False
    group_dropout: float = 0.0

    def __post_init__(self) -> None:
        super(LandmarkConfig, self).__post_init__()
        check_block_size(self.block_size)
        check_group_dropout(self.group_dropout)
        if not self.is_causal:
            raise ValueError("is_causal=False: landmark attention is causal only, pass True")


class LandmarkLayerState(NamedTuple):
    """``cache``, whose ``length`` (B,) is also the position of each row's next token."""

    cache: LandmarkState


class LandmarkAttention(SoftmaxAttention):
    """Multi-head landmark attention (2305.16300). Causal; needs training.

    The token at the end of every block is a landmark: others reach the block through it and never
    read its value. ``update`` and ``step`` keep all tokens and are exact; ``remember`` reads with
    a :class:`LandmarkMemory`, which fetches the best blocks alone.

    Example:
        >>> layer = LandmarkAttention(LandmarkConfig(embed_dim=64, num_heads=4, block_size=10))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "landmark"
    config: LandmarkConfig

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        is_landmark: Tensor | None = None,
        jumps: Tensor | None = None,
    ) -> Tensor:
        """Mix whole sequences.

        Args:
            x, mask, cu_seqlens: as of any mixer.
            is_landmark: (B, N), for landmarks at other places.
            jumps: (B, N), added to the positions of tokens (:func:`landmark_jumps`).
        """
        batch, length = x.shape[:2]
        mask = check_mask(mask, batch, length)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, length)
            ids = sequence_ids(cu_seqlens, length)
            places = torch.arange(length, device=x.device) - cu_seqlens[ids]
        else:
            places = positions(mask, length, device=x.device)
        if jumps is not None:
            places = places + jumps
        q, k, v = self._project(x, places)
        out = landmark(
            q,
            k,
            v,
            is_landmark=is_landmark,
            block_size=self.config.block_size,
            mask=mask,
            cu_seqlens=cu_seqlens,
            group_dropout=self.config.group_dropout if self.training else 0.0,
        )
        return self.out_proj(merge_heads(out))

    def init_state(  # type: ignore[override]
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LandmarkLayerState:
        empty = super().init_state(batch_size, device=device, dtype=dtype).cache
        return LandmarkLayerState(LandmarkState(*state_tensors(empty)))

    def update(  # type: ignore[override]
        self, x: Tensor, state: LandmarkLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LandmarkLayerState]:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        places = positions(mask, x.shape[1], device=x.device) + state.cache.length[:, None]
        q, k, v = self._project(x, places)
        out, cache = landmark_update(
            state.cache, q, k, v, block_size=self.config.block_size, mask=mask
        )
        return self.out_proj(merge_heads(out)), LandmarkLayerState(cache)

    def remember(self, x: Tensor, memory: LandmarkMemory) -> Tensor:
        """Mix the next tokens of a stream, (B, N, C), and put them into the memory.

        Exact where the memory fetches all blocks that it holds; a landmark ends every block of
        the stream, wherever it is cut.

        Raises:
            ValueError: the memory has another block size or other rotary positions.
        """
        c = self.config
        wanted = (c.block_size, c.rotary_theta, c.rotary_interleaved)
        if (memory.block_size, memory.rotary_theta, memory.rotary_interleaved) != wanted:
            raise ValueError(
                "the memory's block_size, rotary_theta and rotary_interleaved are not the "
                f"layer's {wanted}: make it with new_memory()"
            )
        q, k, v = self._heads(x)
        return self.out_proj(merge_heads(attend_with_memory(memory, q, k, v)))

    def new_memory(self, *, top_k: int, **options: object) -> LandmarkMemory:
        """Return an empty memory for this layer; options as :class:`LandmarkMemory`."""
        c = self.config
        return LandmarkMemory(
            block_size=c.block_size,
            top_k=top_k,
            rotary_theta=c.rotary_theta,
            rotary_interleaved=c.rotary_interleaved,
            **options,  # type: ignore[arg-type]
        )

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        return (
            split_heads(self.q_proj(x), c.num_heads),
            split_heads(self.k_proj(x), c.kv_heads),
            split_heads(self.v_proj(x), c.kv_heads),
        )

    def _project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        q, k, v = self._heads(x)
        if c.rotary_theta is not None:
            angles = rotary_angles(places, c.dim, theta=c.rotary_theta)
            turn = c.rotary_interleaved
            q, k = (apply_rotary(t, *angles, interleaved=turn) for t in (q, k))
        return q, k, v
