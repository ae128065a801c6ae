"""Flowformer as a classifier of time series of any length, padded or packed (2202.06258).

B batch, N length, C embed_dim, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention.flow import FlowConfig
from manyheads.config import Config
from manyheads.layers.absolute import sinusoidal
from manyheads.layers.keymap import KeyMap
from manyheads.layers.ragged import check_cu_seqlens, check_mask, positions, sequence_ids
from manyheads.models.base import Model
from manyheads.models.language.flowformer import FlowformerBlock

__all__ = ["FlowformerClassifier", "FlowformerClassifierConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowformerClassifierConfig(Config):
    """Sizes of a :class:`FlowformerClassifier`.

    Attributes:
        in_channels: numbers at each time.
        num_classes: K.
        embed_dim, num_layers, num_heads, mlp_ratio: sizes.
        clamp: bound of the conserved source; None as in the official time series code.
        dropout: on the embedded input, the attention outputs and inside the MLPs while training.
    """

    in_channels: int
    num_classes: int
    embed_dim: int = 128
    num_layers: int = 3
    num_heads: int = 8
    mlp_ratio: float = 2.0
    clamp: float | None = None
    dropout: float = 0.1


class FlowformerClassifier(Model):
    """Classifier of multivariate time series; ragged input costs no accuracy. Needs training.

    Pre-norm blocks of bidirectional flow attention over a linear embedding with sinusoidal
    positions, then the mean over real tokens: a reconstruction around the official operator.

    Example:
        >>> model = FlowformerClassifier(FlowformerClassifierConfig(in_channels=6, num_classes=4))
        >>> model(torch.randn(2, 100, 6)).shape
        torch.Size([2, 4])
    """

    config_class: ClassVar[type[Config]] = FlowformerClassifierConfig
    config: FlowformerClassifierConfig

    def __init__(self, config: FlowformerClassifierConfig) -> None:
        super().__init__()
        self.config = c = config
        attention = FlowConfig(
            embed_dim=c.embed_dim, num_heads=c.num_heads, is_causal=False, clamp=c.clamp,
            dropout=c.dropout,
        )  # fmt: skip
        self.embed = nn.Linear(c.in_channels, c.embed_dim)
        self.dropout = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(
            FlowformerBlock(
                attention, mlp_ratio=c.mlp_ratio, activation_name="gelu", dropout=c.dropout
            )
            for _ in range(c.num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(c.embed_dim)
        self.head = nn.Linear(c.embed_dim, c.num_classes)

    def features(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the normalised features of each time (B, N, C)."""
        batch, length, _ = x.shape
        mask = check_mask(mask, batch, length)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, batch, length)
            ids = sequence_ids(cu_seqlens, length)
            places = torch.arange(length, device=x.device) - cu_seqlens[ids]
        else:
            places = positions(mask, length, device=x.device)
        h = self.embed(x)
        h = self.dropout(h + sinusoidal(places, self.config.embed_dim).to(h))
        for layer in self.layers:
            h = layer(h, mask, cu_seqlens)
        return self.norm(h)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Classify series.

        Args:
            x: (B, N, in_channels).
            mask: (B, N), True = a real time; what stands elsewhere changes nothing if finite.
            cu_seqlens: (S + 1) borders of packed series, with B = 1.

        Returns:
            Logits (B, K), or (S, K) of packed series.
        """
        h = self.features(x, mask=mask, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            ids = sequence_ids(cu_seqlens, h.shape[1])
            total = h.new_zeros(len(cu_seqlens) - 1, h.shape[2]).index_add(0, ids, h[0])
            return self.head(total / cu_seqlens.diff().clamp_min(1)[:, None])
        if mask is None:
            return self.head(h.mean(1))
        real = mask.bool()[..., None]
        count = real.sum(1).clamp_min(1)
        return self.head(h.masked_fill(~real, 0).sum(1) / count)

    def key_map(self) -> KeyMap:
        """The official time series model has another layout: there is nothing to map."""
        raise ValueError("FlowformerClassifier has no official checkpoints: use save() and load()")
