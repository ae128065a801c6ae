"""The sparse-linear attention modules: on queries, keys and values, and as a whole layer.

B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention.sla.op import SLAParts, Variant, check_options, sla, sla_parts
from manyheads.attention.softmax import SoftmaxAttention, SoftmaxConfig
from manyheads.config import Config
from manyheads.layers.keymap import KeyMap, OfficialWeights, rename
from manyheads.layers.ragged import check_mask, positions

__all__ = ["SLAAttention", "SLAConfig", "SparseLinearAttention", "SparseLinearConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseLinearConfig(Config):
    """Sizes and options of :class:`SparseLinearAttention`, as those of ``sla``.

    Attributes:
        head_dim: D of the values.
        topk: share of key blocks with softmax attention; at least one block.
        negligible: share that is left out altogether ("paper" alone).
        block_q, block_k: tokens a block.
        feature_map: "softmax", "elu" or "relu".
        variant: "main", "sla1" or "paper".
    """

    head_dim: int
    topk: float = 0.05
    negligible: float = 0.1
    block_q: int = 64
    block_k: int = 64
    feature_map: str = "softmax"
    variant: Variant = "main"

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ValueError(f"head_dim {self.head_dim} must be at least 1")
        options = self.to_dict()
        del options["head_dim"]
        check_options(**options)


class SparseLinearAttention(OfficialWeights):
    """Softmax over few key blocks and a projected linear rest (2509.24006), in place of attention.

    Approximate: fine-tune the whole model with it. Bidirectional. Its only weights are the
    projection ``proj_l`` of the linear branch, under their official names; they start at zero, so
    that the module starts as sparse attention. They are held and used in float32 at least.

    Args:
        head_dim: D of the values.
        options: those of :class:`SparseLinearConfig`, by name.

    Raises:
        ValueError: an unknown option, or one out of range.

    Example:
        >>> attend = SparseLinearAttention(32, topk=0.1)
        >>> q = k = v = torch.randn(1, 4, 1000, 32)
        >>> attend(q, k, v).shape
        torch.Size([1, 4, 1000, 32])
    """

    config: SparseLinearConfig

    def __init__(self, head_dim: int, **options: int | float | str) -> None:
        super().__init__()
        self.config = SparseLinearConfig.from_dict({"head_dim": head_dim, **options})
        self.proj_l = nn.Linear(head_dim, head_dim, dtype=torch.float32)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the projection to zero."""
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend: (B, H, N, D) each to (B, H, N, D); arguments as :func:`~.sla`."""
        c = self.config
        return sla(
            query,
            key,
            value,
            self.proj_l.weight,
            self.proj_l.bias,
            topk=c.topk,
            negligible=c.negligible,
            block_q=c.block_q,
            block_k=c.block_k,
            feature_map=c.feature_map,
            variant=c.variant,
            scale=scale,
            mask=mask,
            query_mask=query_mask,
            cu_seqlens=cu_seqlens,
        )

    def parts(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> SLAParts:
        """Return both branches, the linear one before its projection, and the block map."""
        c = self.config
        return sla_parts(
            query,
            key,
            value,
            topk=c.topk,
            negligible=c.negligible,
            block_q=c.block_q,
            block_k=c.block_k,
            feature_map=c.feature_map,
            variant=c.variant,
            scale=scale,
            mask=mask,
            query_mask=query_mask,
        )

    def key_map(self) -> KeyMap:
        """Names of the official module."""
        return KeyMap(*(rename(n, n) for n in ("proj_l.weight", "proj_l.bias")))

    def extra_repr(self) -> str:
        c = self.config
        return f"topk={c.topk}, blocks={c.block_q}x{c.block_k}, {c.feature_map}, {c.variant}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SLAConfig(SoftmaxConfig):
    """Sizes and options of an SLA layer: those of softmax attention and of ``sla``.

    Attributes:
        is_causal: always False.
        topk, negligible, block_q, block_k, feature_map, variant: as in
            :class:`SparseLinearConfig`.
    """

    is_causal: bool = False
    topk: float = 0.05
    negligible: float = 0.1
    block_q: int = 64
    block_k: int = 64
    feature_map: str = "softmax"
    variant: Variant = "main"

    def __post_init__(self) -> None:
        super(SLAConfig, self).__post_init__()
        if self.is_causal:
            raise ValueError("sla has no causal form: is_causal=True is not possible")
        _ = self.core

    @property
    def core(self) -> SparseLinearConfig:
        return SparseLinearConfig(
            head_dim=self.dim,
            topk=self.topk,
            negligible=self.negligible,
            block_q=self.block_q,
            block_k=self.block_k,
            feature_map=self.feature_map,
            variant=self.variant,
        )


class SLAAttention(SoftmaxAttention):
    """The softmax layer with sparse-linear attention inside (2509.24006). Bidirectional.

    Approximate: weights of a softmax layer fit, but the model must be fine-tuned. Projections,
    rotary positions and grouped key-value heads are those of ``SoftmaxAttention``.

    Example:
        >>> layer = SLAAttention(SLAConfig(embed_dim=64, num_heads=4, topk=0.2, block_k=16))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "sla"
    config: SLAConfig

    def __init__(self, config: SLAConfig) -> None:
        super().__init__(config)
        self.attention = SparseLinearAttention(**config.core.to_dict())

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self.attention(q, k, v, mask=mask, cu_seqlens=cu_seqlens)

    def block_map(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return the block map (B, H, P, Q) of an input (B, N, C), as in ``SLAParts``."""
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v = self._project(x, positions(mask, x.shape[1], device=x.device))
        return self.attention.parts(q, k, v, mask=mask).block_map

    def key_map(self) -> KeyMap:
        """Names of the softmax layer, and the projection's official ones."""
        own = (rename(f"attention.{n}", n) for n in ("proj_l.weight", "proj_l.bias"))
        return KeyMap(*super().key_map().entries, *own)
