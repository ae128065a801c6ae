"""TransNormer as a classifier of long sequences: the Long Range Arena models (2210.10340).

B batch, N length, C embed_dim, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.diag import DiagAttention, DiagConfig
from manyheads.attention.norm import NormAttention, NormConfig
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.keymap import KeyMap
from manyheads.layers.ragged import check_cu_seqlens, check_mask
from manyheads.layers.token_norm import TOKEN_NORMS, token_norm
from manyheads.models.base import Model, register_variants
from manyheads.models.language.transnormer_blocks import half_local

__all__ = ["TransNormerLRA", "TransNormerLRAConfig", "lra_diag_config", "lra_norm_config"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransNormerLRAConfig(Config):
    """Sizes and options; exactly one of ``vocab_size`` and ``in_channels`` is set.

    Attributes:
        num_classes: K.
        vocab_size: of token input (B, N).
        in_channels: of real input (B, N, in_channels): pixels one by one.
        embed_dim, num_layers, num_heads: sizes; the first half of the layers is block-local.
        expansion: hidden width of the MLPs as a multiple of ``embed_dim``.
        variant: "t1" (relu and norm in blocks, elu) or "t2" (softmax in blocks, 1 + elu).
        norm: of the branches, of the attention's output and at the end: "synbatch" (batch norm
            over all tokens of all processes, as published), "batch", "layer" or "simplerms" (per
            token; the official one runs over the batch by mistake).
        block_size: of the block-local layers.
        dropout: on the branches, in the MLPs and on the block-local weights.
        pair: two sequences a row (B, 2, N), as in document matching: their mean features u and v
            are classified as [u, v, u - v, u · v].
    """

    num_classes: int
    vocab_size: int | None = None
    in_channels: int | None = None
    embed_dim: int = 128
    num_layers: int = 4
    num_heads: int = 8
    expansion: float = 4
    variant: Literal["t1", "t2"] = "t2"
    norm: str = "synbatch"
    block_size: int = 64
    dropout: float = 0.0
    pair: bool = False

    def __post_init__(self) -> None:
        if (self.vocab_size is None) == (self.in_channels is None):
            raise ValueError("set vocab_size for tokens or in_channels for real input, one of them")
        if self.norm not in TOKEN_NORMS:
            raise unknown_name("norm", self.norm, TOKEN_NORMS)

    @property
    def width(self) -> int:
        return int(self.embed_dim * self.expansion)


def lra_norm_config(
    *, embed_dim: int, num_heads: int, variant: Literal["t1", "t2"], norm: str
) -> NormConfig:
    """Return the config of the linear layer: fixed angles, no reflection, both directions."""
    return NormConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        is_causal=False,
        variant=variant,
        learned_angles=False,
        householder=False,
        norm=norm,
        layout="lra",
    )


def lra_diag_config(
    *,
    embed_dim: int,
    num_heads: int,
    variant: Literal["t1", "t2"],
    norm: str,
    block_size: int = 64,
    attention_dropout: float = 0.0,
) -> DiagConfig:
    """Return the config of the block-local layer: as :func:`lra_norm_config`, padding counted.

    With ``is_causal`` changed to True it removes the future after the softmax, as published.
    """
    return DiagConfig(
        embed_dim=embed_dim,
        num_heads=num_heads,
        is_causal=False,
        variant=variant,
        learned_angles=False,
        householder=False,
        norm=norm,
        layout="lra",
        block_size=block_size,
        attention_dropout=attention_dropout,
        pad_keys=True,
        mask_after_softmax=True,
    )


class _Block(nn.Module):
    """x += attention(norm(x)); x += Linear-GELU-Linear(norm(x))."""

    def __init__(self, config: TransNormerLRAConfig, layer_type: str) -> None:
        super().__init__()
        c = config
        self.mixer_norm = token_norm(c.norm, c.embed_dim)
        self.mixer: NormAttention | DiagAttention
        if layer_type == "norm":
            self.mixer = NormAttention(
                lra_norm_config(
                    embed_dim=c.embed_dim, num_heads=c.num_heads, variant=c.variant, norm=c.norm
                )
            )
        else:
            self.mixer = DiagAttention(
                lra_diag_config(
                    embed_dim=c.embed_dim,
                    num_heads=c.num_heads,
                    variant=c.variant,
                    norm=c.norm,
                    block_size=c.block_size,
                    attention_dropout=c.dropout,
                )
            )
        self.mlp_norm = token_norm(c.norm, c.embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(c.embed_dim, c.width),
            nn.GELU(),
            nn.Dropout(c.dropout),
            nn.Linear(c.width, c.embed_dim),
        )
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        normed = self.mixer_norm(x, mask=mask)
        x = x + self.dropout(self.mixer(normed, mask=mask, cu_seqlens=cu_seqlens))
        return x + self.dropout(self.mlp(self.mlp_norm(x, mask=mask)))


class TransNormerLRA(Model):
    """Classifier of long sequences of tokens or pixels, linear in their length. Needs training.

    Example:
        >>> config = TransNormerLRAConfig(num_classes=10, in_channels=1, embed_dim=32)
        >>> TransNormerLRA(config)(torch.randn(2, 100, 1)).shape
        torch.Size([2, 10])
    """

    config_class: ClassVar[type[Config]] = TransNormerLRAConfig
    config: TransNormerLRAConfig

    def __init__(self, config: TransNormerLRAConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed: nn.Module
        if c.vocab_size is not None:
            self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        else:
            self.embed = nn.Linear(cast(int, c.in_channels), c.embed_dim)
        self.layers = nn.ModuleList(_Block(c, name) for name in half_local(c.num_layers))
        self.norm = token_norm(c.norm, c.embed_dim)
        self.head: nn.Module
        if c.pair:
            self.head = nn.Sequential(
                nn.Linear(4 * c.embed_dim, c.embed_dim),
                nn.ReLU(),
                nn.Linear(c.embed_dim, c.num_classes),
            )
        else:
            self.head = nn.Linear(c.embed_dim, c.num_classes)

    def features(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the normalised token features (B, N, C)."""
        mask = check_mask(mask, x.shape[0], x.shape[1])
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, mask, cu_seqlens)
        return self.norm(h, mask=mask)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Classify sequences.

        Args:
            x: tokens (B, N) or real input (B, N, in_channels); with ``pair``, (B, 2, N, ...).
            mask: (B, N), True = a real token, on any side; with ``pair``, (B, 2, N).
            cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; not with ``pair``.

        Returns:
            (B, K), or (S, K) for packed sequences.

        Raises:
            ValueError: shapes do not fit.
        """
        if not self.config.pair:
            return self.head(self._mean(x, mask, cu_seqlens))
        if x.ndim < 3 or x.shape[1] != 2 or cu_seqlens is not None:
            raise ValueError(
                f"input has shape {tuple(x.shape)}: a model of pairs needs (batch, 2, length, ...) "
                "and a mask instead of cu_seqlens"
            )
        both = None if mask is None else mask.flatten(0, 1)
        u, v = self._mean(x.flatten(0, 1), both, None).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat((u, v, u - v, u * v), -1))

    def _mean(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        h = self.features(x, mask=mask, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
            sums = F.pad(h[0].cumsum(0), (0, 0, 1, 0))[cu_seqlens]
            count = (cu_seqlens[1:] - cu_seqlens[:-1]).clamp_min(1)
            return (sums[1:] - sums[:-1]) / count[:, None]
        if mask is None:
            return h.mean(1)
        kept = h.masked_fill(~mask[..., None], 0)
        return kept.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)

    def key_map(self) -> KeyMap:
        """Only the attention layers have official checkpoints here."""
        raise ValueError(
            "TransNormerLRA has no official checkpoints as a whole: use save() and load(), or "
            "load_official() of its attention layers"
        )


def _row(
    classes: int, layers: int, dim: int, expansion: float, heads: int, **options: object
) -> TransNormerLRAConfig:
    return TransNormerLRAConfig.from_dict(
        {
            "num_classes": classes,
            "num_layers": layers,
            "embed_dim": dim,
            "expansion": expansion,
            "num_heads": heads,
            **options,
        }
    )


_BYTES = 256
_ROWS = {
    "cifar": _row(10, 12, 128, 2, 4, in_channels=1),
    "imdb": _row(2, 4, 128, 4, 8, vocab_size=_BYTES),
    "listops": _row(10, 4, 128, 4, 8, vocab_size=16),
    "pathfinder": _row(2, 4, 128, 1, 8, in_channels=1),
    "aan": _row(2, 4, 128, 4, 4, vocab_size=_BYTES, pair=True),
    "pathfinderx": _row(2, 6, 64, 2.5, 8, in_channels=1),
}

register_variants(
    TransNormerLRA,
    "transnormer",
    {
        f"transnormer_lra_{task}_{t}": (
            config.replace(variant=t),
            (f"transnormer_lra_{task}",) if t == "t2" else (),
        )
        for task, config in _ROWS.items()
        for t in ("t1", "t2")
    },
)
