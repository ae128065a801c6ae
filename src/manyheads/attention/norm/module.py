"""The NormAttention layer. B batch, N length, C embed_dim, H heads, D head dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.norm.definition import NormState, norm_step
from manyheads.attention.norm.op import norm, norm_update
from manyheads.layers.activations import activation
from manyheads.layers.heads import merge_heads
from manyheads.layers.normed_mixer import NormedMixer, NormedMixerConfig
from manyheads.layers.ragged import check_mask, positions

__all__ = ["NormAttention", "NormConfig", "NormLayerState"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig(NormedMixerConfig):
    """Sizes and options of a NormAttention layer, beside those of both layers.

    ``variant`` "t1": queries and keys through elu, so that weights may be negative. "t2": 1 + elu.

    Attributes:
        feature_map: another activation by name (None: the variant's).
    """

    feature_map: str | None = None

    def __post_init__(self) -> None:
        super(NormConfig, self).__post_init__()
        activation(self.feature)

    @property
    def feature(self) -> str:
        return self.feature_map or ("elu" if self.variant == "t1" else "1+elu")


class NormLayerState(NamedTuple):
    """``attention`` and ``length`` (B,), the tokens read so far: the next token's position."""

    attention: NormState
    length: Tensor


class NormAttention(NormedMixer):
    """Linear attention without a denominator, then a norm (2210.10340). Needs training.

    The norm spans all heads, so that they are coupled. The state is one D x D matrix a head.

    Example:
        >>> layer = NormAttention(NormConfig(embed_dim=64, num_heads=4))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "norm"
    official_norm = "layer_norm"
    config: NormConfig

    def __init__(self, config: NormConfig) -> None:
        super().__init__(config, gain=2**-0.5, normed=True)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        c = self.config
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v = self._features(x, self._places(x, mask, cu_seqlens))
        out = norm(
            q,
            k,
            v,
            is_causal=c.is_causal,
            mask=mask,
            cu_seqlens=cu_seqlens,
            eps=c.eps,
            normalize=self._inside,
        )
        return self._finish(out, x, mask)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> NormLayerState:
        if not self.config.is_causal:
            return super().init_state(batch_size)
        c, weight = self.config, self.q_proj.weight
        device = device or weight.device
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        sizes = (batch_size, c.num_heads, c.head_dim, c.head_dim)
        memory = torch.zeros(sizes, device=device, dtype=wide)
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        return NormLayerState(NormState(memory), length)

    def update(
        self, x: Tensor, state: NormLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, NormLayerState]:
        if not self.config.is_causal:
            return super().update(x, state, mask=mask)
        mask = check_mask(mask, x.shape[0], x.shape[1])
        places = positions(mask, x.shape[1], device=x.device) + state.length[:, None]
        q, k, v = self._features(x, places)
        out, attention = norm_update(
            state.attention, q, k, v, mask=mask, eps=self.config.eps, normalize=self._inside
        )
        length = state.length + (x.shape[1] if mask is None else mask.sum(1))
        return self._finish(out, x, mask), NormLayerState(attention, length)

    def step(self, x: Tensor, state: NormLayerState) -> tuple[Tensor, NormLayerState]:
        if not self.config.is_causal:
            return super().step(x, state)
        q, k, v = (t.squeeze(2) for t in self._features(x[:, None], state.length[:, None]))
        out, attention = norm_step(
            state.attention, q, k, v, eps=self.config.eps, normalize=self._inside
        )
        y = self._finish(out[:, :, None], x[:, None], None)
        return y[:, 0], NormLayerState(attention, state.length + 1)

    @property
    def _inside(self) -> bool:
        """Whether the norm is the function's own; another needs the plain sums."""
        return self.config.norm == "simplerms"

    def _features(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The plain sums grow with N: in float16 they would overflow on the way to another norm.
        return self._project(x, places, feature=self.config.feature, widen=not self._inside)

    def _finish(self, out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        y = merge_heads(out)
        if self.norm is not None and not self._inside:
            y = self.norm(y, mask=mask)
        return self.out_proj(y.to(x.dtype))
