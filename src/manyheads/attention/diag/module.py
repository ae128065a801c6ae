"""The DiagAttention layer. B batch, N length, C embed_dim, H heads, D head dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manyheads.attention.diag.definition import Kind
from manyheads.attention.diag.op import DiagState, diag, diag_step, diag_update
from manyheads.layers.heads import merge_heads
from manyheads.layers.normed_mixer import NormedMixer, NormedMixerConfig
from manyheads.layers.ragged import check_mask, positions

__all__ = ["DiagAttention", "DiagConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DiagConfig(NormedMixerConfig):
    """Sizes and options of a DiagAttention layer, beside those of both layers.

    ``variant`` "t1": relu(scores), then the norm over all heads. "t2": softmax, no norm.

    Attributes:
        block_size: tokens a block.
        attention_dropout: on the weights, in training.
        pad_keys: fill the last block up with zero keys that a bidirectional softmax counts, as
            the official code does.
        mask_after_softmax: remove the future after the softmax, as the Long Range Arena code
            does; the denominators then see it, so that the layer is not causal and cannot stream.
    """

    block_size: int = 64
    attention_dropout: float = 0.0
    pad_keys: bool = False
    mask_after_softmax: bool = False

    def __post_init__(self) -> None:
        super(DiagConfig, self).__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} must be at least 1")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"attention_dropout {self.attention_dropout} must lie in [0, 1)")

    @property
    def kind(self) -> Kind:
        return "relu" if self.variant == "t1" else "softmax"


class DiagAttention(NormedMixer):
    """Block-local attention layer of TransNormer (2210.10340). Local; needs training.

    Tokens see their own block alone: a model needs other layers (NormAttention) to carry
    anything further. The state is at most one block of keys and values.

    Example:
        >>> layer = DiagAttention(DiagConfig(embed_dim=64, num_heads=4, block_size=32))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "diag"
    official_norm = "normalize"
    config: DiagConfig

    def __init__(self, config: DiagConfig) -> None:
        super().__init__(config, gain=1.0, normed=config.variant == "t1")

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        c = self.config
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v = self._turned(x, self._places(x, mask, cu_seqlens))
        out = diag(
            q,
            k,
            v,
            is_causal=c.is_causal,
            block_size=c.block_size,
            kind=c.kind,
            mask=mask,
            cu_seqlens=cu_seqlens,
            pad_keys=c.pad_keys,
            mask_after_softmax=c.mask_after_softmax,
            dropout_p=c.attention_dropout if self.training else 0.0,
        )
        return self._finish(out, x, mask)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DiagState:
        self._check_streams(batch_size)
        c, weight = self.config, self.q_proj.weight
        device = device or weight.device
        dtype = torch.promote_types(dtype or weight.dtype, torch.float32)
        size = (batch_size, c.num_heads, c.block_size, c.head_dim)
        key = torch.zeros(size, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        return DiagState(key, torch.zeros_like(key), length)

    def update(
        self, x: Tensor, state: DiagState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, DiagState]:
        self._check_streams(x.shape[0])
        c = self.config
        mask = check_mask(mask, x.shape[0], x.shape[1])
        places = positions(mask, x.shape[1], device=x.device) + state.length[:, None]
        q, k, v = self._turned(x, places)
        dropout = c.attention_dropout if self.training else 0.0
        out, state = diag_update(
            state, q, k, v, block_size=c.block_size, kind=c.kind, mask=mask, dropout_p=dropout
        )
        return self._finish(out, x, mask), state

    def step(self, x: Tensor, state: DiagState) -> tuple[Tensor, DiagState]:
        self._check_streams(x.shape[0])
        c = self.config
        q, k, v = (t.squeeze(2) for t in self._turned(x[:, None], state.length[:, None]))
        out, state = diag_step(state, q, k, v, block_size=c.block_size, kind=c.kind)
        return self._finish(out[:, :, None], x[:, None], None)[:, 0], state

    def _check_streams(self, batch_size: int) -> None:
        if not self.config.is_causal:
            super().init_state(batch_size)
        if self.config.mask_after_softmax:
            raise ValueError("mask_after_softmax=True sees the future: it has no streaming form")

    def _turned(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # With relu a row may be all zero, where the norm's slope is 1 / eps: too steep for float16.
        widen = self.config.kind == "relu"
        return self._project(x, places % self.config.block_size, widen=widen)

    def _finish(self, out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        y = merge_heads(out)
        if self.norm is not None:
            y = self.norm(y, mask=mask)
        return self.out_proj(y.to(x.dtype))
