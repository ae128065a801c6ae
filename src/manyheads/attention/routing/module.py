"""The routing layer: routing heads beside local ones (2003.05997).

B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.routing.config import RoutingConfig
from manyheads.attention.routing.definition import (
    RoutingState,
    routing_normalize,
    routing_step,
)
from manyheads.attention.routing.kmeans import OnlineKMeans
from manyheads.attention.routing.local import (
    LocalState,
    blocked_local,
    blocked_local_init,
    blocked_local_update,
)
from manyheads.attention.routing.official import layer_entries, with_averages
from manyheads.attention.routing.op import routing
from manyheads.attention.routing.relative import RelativeTables, named_tables
from manyheads.attention.routing.stream import routing_init, routing_update
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, read_weights
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask

__all__ = ["RoutingAttention", "RoutingLayerState"]


class RoutingLayerState(NamedTuple):
    """``routing`` and ``local``; None where the layer has no such heads."""

    routing: RoutingState | None
    local: LocalState | None


class RoutingAttention(SequenceMixer):
    """Content-based sparse attention beside local attention (2003.05997). Needs training.

    Causal layers route strictly by default: nothing looks ahead, and steps equal the whole. The
    published selection ("official") looks at the whole sequence. Centroids move in training mode,
    once for each optimizer step (:class:`OnlineKMeans`); their loss comes with
    :meth:`forward_with_loss`.

    Example:
        >>> layer = RoutingAttention(RoutingConfig(embed_dim=64, num_heads=4, clusters=4))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "routing"
    config: RoutingConfig

    def __init__(self, config: RoutingConfig) -> None:
        super().__init__()
        self.config = c = config
        dim = c.embed_dim // c.num_heads
        self.q_proj = Linear(c.embed_dim, c.embed_dim, bias=False)
        self.k_proj = Linear(c.embed_dim, c.embed_dim, bias=False)
        self.v_proj = Linear(c.embed_dim, c.embed_dim, bias=False)
        self.out_proj = Linear(c.embed_dim, c.embed_dim, bias=False)
        if c.shares and not c.local:
            self.k_proj.weight.requires_grad_(False)  # official checkpoints hold it unused
        self.head_proj = Linear(dim, dim, bias=False)
        self.kmeans = self.strided_kmeans = None
        options: dict[str, Any] = {"decay": c.decay, "beta": c.beta, "ema": c.ema}
        options["mixed_counts"] = c.resolved == "official"
        if c.routed:
            self.kmeans = OnlineKMeans(c.routed, c.clusters, dim, **options)
        if c.strided_heads:
            self.strided_kmeans = OnlineKMeans(c.strided_heads, c.clusters, dim, **options)
        clustered = c.reach > 0 and c.cluster_relative
        self.cluster_tables = RelativeTables(c.reach, dim) if clustered and c.routed else None
        self.strided_tables = (
            RelativeTables(c.reach, dim) if clustered and c.strided_heads else None
        )
        near = c.reach > 0 and c.local_relative and c.local > 0
        self.local_tables = RelativeTables(c.reach, dim) if near else None

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return self._run(x, mask, cu_seqlens, with_loss=False)[0]

    def forward_with_loss(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the clustering loss, a scalar to be added to the model's loss."""
        return self._run(x, mask, cu_seqlens, with_loss=True)

    def update_centroids(self) -> None:
        """Move the centroids now by what was observed since they moved last."""
        for kmeans in (self.kmeans, self.strided_kmeans):
            if kmeans is not None:
                kmeans.update_centroids()

    def _run(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *, with_loss: bool
    ) -> tuple[Tensor, Tensor]:
        c = self.config
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v = self._project(x)
        loss, outputs, first = x.new_zeros(()), [], 0
        kinds = (
            (c.routed, self.kmeans, self.cluster_tables, False),
            (c.strided_heads, self.strided_kmeans, self.strided_tables, True),
        )
        for heads, kmeans, tables, strided in kinds:
            if kmeans is None:
                continue
            part = slice(first, first + heads)
            out, own = self._routed(
                q[:, part], k[:, part], v[:, part], kmeans, tables, strided, mask, cu_seqlens,
                with_loss,
            )  # fmt: skip
            outputs.append(out)
            loss, first = loss + own, first + heads
        if c.local:
            outputs.append(
                blocked_local(
                    q[:, first:],
                    k[:, first:],
                    v[:, first:],
                    block=c.block,
                    flange=c.margin,
                    is_causal=c.is_causal,
                    mask=mask,
                    cu_seqlens=cu_seqlens,
                    dropout_p=self._dropout,
                    **named_tables(self.local_tables),
                )
            )
        return self._finish(torch.cat(outputs, 1)), loss

    def _routed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kmeans: OnlineKMeans,
        tables: RelativeTables | None,
        strided: bool,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        with_loss: bool,
    ) -> tuple[Tensor, Tensor]:
        c, length = self.config, q.shape[2]
        official = c.resolved == "official"
        if official:
            # The official layer fills up to whole blocks, and lets the filling be chosen.
            fill = -length % c.block
            q, k, v = (F.pad(t, (0, 0, 0, fill)) for t in (q, k, v))
            mask = None if mask is None else F.pad(mask, (0, fill))
        # Routing undoes any scale but that of eps; official queries are scaled before.
        q = q * q.shape[-1] ** -0.5
        k = q if c.shares else k
        kmeans.prepare(self.parameters())
        counted = None if official else mask
        loss = q.new_zeros(())
        if with_loss or kmeans.training:
            parts = [routing_normalize(q)]
            if not c.shares:
                parts.append(routing_normalize(k))
            if with_loss or not c.ema:
                loss = loss + sum(kmeans.loss(t, mask=counted) for t in parts)
                loss = loss * 2 if c.shares else loss
        out = routing(
            q,
            k,
            v,
            kmeans.means,
            window=c.window,
            is_causal=c.is_causal,
            selection=c.resolved,  # type: ignore[arg-type]
            strided=strided,
            mask=mask,
            cu_seqlens=cu_seqlens,
            dropout_p=self._dropout,
            **named_tables(tables),
        )
        if kmeans.training:
            for t in parts:
                kmeans.observe(t, mask=counted)
        return out[:, :, :length], loss

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RoutingLayerState:
        self._check_streams(batch_size)
        c, weight = self.config, self.q_proj.weight
        like = torch.empty(0, device=device or weight.device, dtype=dtype or weight.dtype)
        routed = local = None
        if self.kmeans is not None:
            means = self.kmeans.means.to(like.device)
            routed = routing_init(batch_size, means, window=c.window, dtype=like.dtype)
        if c.local:
            dim = c.embed_dim // c.num_heads
            local = blocked_local_init(
                batch_size, c.local, dim, block=c.block, flange=c.margin, like=like
            )
        return RoutingLayerState(routed, local)

    def update(
        self, x: Tensor, state: RoutingLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, RoutingLayerState]:
        self._check_streams(x.shape[0])
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v = self._project(x)
        outputs, first, routed, local = [], self.config.routed, state.routing, state.local
        if self.kmeans is not None and routed is not None:
            own = q[:, :first] * q.shape[-1] ** -0.5
            out, routed = routing_update(
                routed,
                own,
                own if self.config.shares else k[:, :first],
                v[:, :first],
                self.kmeans.means,
                mask=mask,
                **named_tables(self.cluster_tables),
            )
            outputs.append(out)
        if local is not None:
            out, local = self._local_update(local, q[:, first:], k[:, first:], v[:, first:], mask)
            outputs.append(out)
        return self._finish(torch.cat(outputs, 1)), RoutingLayerState(routed, local)

    def step(self, x: Tensor, state: RoutingLayerState) -> tuple[Tensor, RoutingLayerState]:
        self._check_streams(x.shape[0])
        q, k, v = self._project(x[:, None])
        outputs, first, routed, local = [], self.config.routed, state.routing, state.local
        if self.kmeans is not None and routed is not None:
            own = q[:, :first, 0] * q.shape[-1] ** -0.5
            out, routed = routing_step(
                routed,
                own,
                own if self.config.shares else k[:, :first, 0],
                v[:, :first, 0],
                self.kmeans.means,
                **named_tables(self.cluster_tables),
            )
            outputs.append(out[:, :, None])
        if local is not None:
            out, local = self._local_update(local, q[:, first:], k[:, first:], v[:, first:], None)
            outputs.append(out)
        return self._finish(torch.cat(outputs, 1))[:, 0], RoutingLayerState(routed, local)

    def _local_update(
        self, state: LocalState, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, LocalState]:
        c = self.config
        return blocked_local_update(
            state, q, k, v, block=c.block, flange=c.margin, mask=mask,
            **named_tables(self.local_tables),
        )  # fmt: skip

    def _check_streams(self, batch_size: int) -> None:
        if not self.config.is_causal:
            super().init_state(batch_size)
        if self.config.resolved != "strict":
            raise ValueError(
                f"selection={self.config.selection!r} looks at the whole sequence and has no "
                "streaming form: build the layer with selection='strict'"
            )

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.config.num_heads
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(p(x), heads) for p in projections)
        return q, k, v

    def _finish(self, out: Tensor) -> Tensor:
        return self.out_proj(merge_heads(self.head_proj(out.to(self.head_proj.weight.dtype))))

    def key_map(self) -> KeyMap:
        """Variables of the official TensorFlow layer, below its own scope."""
        return KeyMap(*layer_entries("", "", self.config))

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        return super().load_official(with_averages(read_weights(source)))
