"""The softmax layer with a clipped softmax. Shapes as of the softmax layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyheads.attention.clipped_softmax.definition import check_stretch
from manyheads.attention.clipped_softmax.op import clipped_softmax, clipped_softmax_update
from manyheads.attention.softmax.module import SoftmaxAttention, SoftmaxConfig
from manyheads.attention.softmax.op import SoftmaxState

__all__ = ["ClippedSoftmaxAttention", "ClippedSoftmaxConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedSoftmaxConfig(SoftmaxConfig):
    """Sizes of a softmax layer, and how far its softmax is stretched before it is clipped.

    Attributes:
        gamma: at most 0; None for −alpha / max_length.
        eta: at least 1.
        alpha: how many times an equal share may be clipped, where gamma is None.
        max_length: the training length, a constant: not the length of the input at hand.
    """

    gamma: float | None = None
    eta: float = 1.0
    alpha: float = 12.0
    max_length: int = 2048

    def __post_init__(self) -> None:
        super(ClippedSoftmaxConfig, self).__post_init__()
        if self.max_length < 1:
            raise ValueError(f"max_length {self.max_length} must be at least 1")
        if self.alpha < 0:
            raise ValueError(f"alpha {self.alpha} must be at least 0")
        check_stretch(self.clip_gamma, self.eta)

    @property
    def clip_gamma(self) -> float:
        """The lower end of the stretched interval."""
        return -self.alpha / self.max_length if self.gamma is None else self.gamma


class ClippedSoftmaxAttention(SoftmaxAttention):
    """Attention whose weights reach 0 exactly (2306.12929). Another function: needs training.

    The weights, names and state of :class:`manyheads.attention.SoftmaxAttention`.

    Example:
        >>> layer = ClippedSoftmaxAttention(ClippedSoftmaxConfig(embed_dim=64, max_length=128))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "clipped_softmax"
    config: ClippedSoftmaxConfig

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        c = self.config
        return clipped_softmax(
            q, k, v, gamma=c.clip_gamma, eta=c.eta, is_causal=c.is_causal, mask=mask,
            cu_seqlens=cu_seqlens,
        )  # fmt: skip

    def _attend_cache(
        self, cache: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        c = self.config
        return clipped_softmax_update(cache, q, k, v, gamma=c.clip_gamma, eta=c.eta, mask=mask)

    def _attend_kept(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        c = self.config
        return clipped_softmax(q, k, v, gamma=c.clip_gamma, eta=c.eta, attn_mask=allowed)
