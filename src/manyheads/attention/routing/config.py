"""Sizes and options of a routing layer. C embed_dim, H heads."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.attention.routing.definition import Selection
from manyheads.attention.routing.op import check_selection
from manyheads.config import Config

__all__ = ["RoutingConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingConfig(Config):
    """Sizes and options of a routing layer.

    Heads are ordered routing, strided, local, as in official checkpoints.

    Attributes:
        embed_dim, num_heads: C and H.
        local_heads: heads that see their surroundings (None: half of what is not strided).
        strided_heads: routing heads that choose near and far tokens alike; they look ahead.
        clusters, window: centroids of a routing head, and tokens of a cluster.
        block, flange: of local heads (flange None: as block).
        is_causal: whether a token sees later ones.
        selection: who meets in a cluster, see :func:`manyheads.attention.routing`.
        share_qk: whether routing heads use queries as keys (None: where causal).
        relative: R of the tables of relative positions (None: block + flange + 1; 0: none).
        local_relative, cluster_relative: whether the two kinds of heads have such tables.
        ema: centroids follow averages; False: the gradient.
        decay, beta: of the averages, and weight of the clustering loss.
        dropout: of attention weights.
    """

    embed_dim: int
    num_heads: int = 8
    local_heads: int | None = None
    strided_heads: int = 0
    clusters: int = 8
    window: int = 64
    block: int = 64
    flange: int | None = None
    is_causal: bool = True
    selection: Selection = "auto"
    share_qk: bool | None = None
    relative: int | None = None
    local_relative: bool = True
    cluster_relative: bool = True
    ema: bool = True
    decay: float = 0.999
    beta: float = 1e-4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if not 0 <= self.local + self.strided_heads <= self.num_heads:
            raise ValueError(
                f"{self.local} local and {self.strided_heads} strided heads are more than "
                f"num_heads {self.num_heads}"
            )
        for name in ("block", "window", "clusters"):
            if getattr(self, name) < 1 and (name == "block" or self.local < self.num_heads):
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        check_selection(self.selection, is_causal=self.is_causal, strided=self.strided_heads > 0)

    @property
    def local(self) -> int:
        """Heads that are local."""
        if self.local_heads is not None:
            return self.local_heads
        return (self.num_heads - self.strided_heads) // 2

    @property
    def routed(self) -> int:
        """Heads that route to the nearest tokens."""
        return self.num_heads - self.strided_heads - self.local

    @property
    def shares(self) -> bool:
        return self.is_causal if self.share_qk is None else self.share_qk

    @property
    def resolved(self) -> str:
        """The selection, with "auto" decided."""
        return check_selection(
            self.selection, is_causal=self.is_causal, strided=self.strided_heads > 0
        )

    @property
    def reach(self) -> int:
        return self.block + self.margin + 1 if self.relative is None else self.relative

    @property
    def margin(self) -> int:
        return self.block if self.flange is None else self.flange
