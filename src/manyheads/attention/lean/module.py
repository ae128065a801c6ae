"""The softmax layer decoded by lean attention. Shapes as of the softmax layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from manyheads.attention.lean.op import lean
from manyheads.attention.lean.plan import ORDERS, Order
from manyheads.attention.lean.streaming import lean_update
from manyheads.attention.softmax.module import SoftmaxAttention, SoftmaxConfig
from manyheads.attention.softmax.op import SoftmaxState
from manyheads.errors import unknown_name

__all__ = ["LeanAttention", "LeanConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LeanConfig(SoftmaxConfig):
    """Sizes of a softmax layer, and how its cache is dealt to workers.

    Attributes:
        workers: pieces of equal work (None: torch's threads, or fewer for little work).
        tile: keys a tile.
        order: of the line of tiles, "head" or "request".
    """

    workers: int | None = None
    tile: int = 256
    order: Order = "request"

    def __post_init__(self) -> None:
        super(LeanConfig, self).__post_init__()
        for name, value in (("workers", self.workers), ("tile", self.tile)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.order not in ORDERS:
            raise unknown_name("order", self.order, ORDERS)


class LeanAttention(SoftmaxAttention):
    """Softmax attention whose key-value cache is decoded by lean attention (2405.10480). Exact.

    The same function, weights and state as :class:`manyheads.attention.SoftmaxAttention`.

    Example:
        >>> layer = LeanAttention(LeanConfig(embed_dim=64, num_heads=4, num_kv_heads=1))
        >>> y, state = layer.update(torch.randn(1, 100, 64), layer.init_state(1))
        >>> layer.step(torch.randn(1, 64), state)[0].shape
        torch.Size([1, 64])
    """

    mechanism: ClassVar[str] = "lean"
    config: LeanConfig

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        c = self.config
        return lean(
            q, k, v, is_causal=c.is_causal, mask=mask, cu_seqlens=cu_seqlens, workers=c.workers,
            tile=c.tile, order=c.order,
        )  # fmt: skip

    def _attend_cache(
        self, cache: SoftmaxState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        c = self.config
        return lean_update(cache, q, k, v, mask=mask, workers=c.workers, tile=c.tile, order=c.order)

    def _attend_kept(self, q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
        if allowed is not None:  # heads that see different keys are no work that can be dealt
            return super()._attend_kept(q, k, v, allowed)
        c = self.config
        return lean(q, k, v, workers=c.workers, tile=c.tile, order=c.order)
