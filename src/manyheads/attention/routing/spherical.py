"""The widely used PyTorch variant of routing attention, which differs from the paper's code.

Tokens are L2-normalised for routing alone, means are unit vectors, scores are q · k / sqrt(D)
(with shared queries and keys, q · k / |k| / sqrt(D)), and learned memory keys stand before every
cluster. B batch, H heads, N queries, M keys, D head dim, C clusters, W window, E memory keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.routing.definition import routing_distances, routing_select, take_rows
from manyheads.attention.routing.kmeans import FollowedCentroids, kmeans_loss, kmeans_sums
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask

__all__ = ["SphericalKMeans", "spherical_loss", "spherical_routing"]

_SELF = -5e4  # of a token to itself where queries are keys: it is seen if nothing else is
_EPS = 1e-5
_STARTS = 10


def spherical_routing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    means: Tensor,
    *,
    window: int,
    key_window: int | None = None,
    is_causal: bool = False,
    share_qk: bool = False,
    memory_key: Tensor | None = None,
    memory_value: Tensor | None = None,
    mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention inside clusters as the PyTorch package ``routing-transformer`` has it.

    **Looks ahead**: keys are hidden by their places where causal, but who meets is decided over
    the whole sequence. Needs training.

    Args:
        query: (B, H, N, D); key, value: (B, H, M, D), N = M where causal or shared.
        means: (H, C, D), unit vectors.
        window, key_window: queries and keys (None: as queries) of a cluster.
        share_qk: queries are keys: ``key`` is not read, and a token sees itself only where it
            sees nothing else.
        memory_key, memory_value: (H, C, E, D), seen by all queries of a cluster.
        mask, key_mask: (B, N) and (B, M), True = real (key_mask None: as mask); a query that is
            padding averages what it would see.

    Returns:
        (B, H, N, D); a token that no centroid chooses gives 0.
    """
    check_qkv(query, key, value, same_length=is_causal or share_qk)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    key_mask = check_mask(key_mask, batch, key.shape[2])
    if key_mask is None and mask is not None and key.shape[2] == length:
        key_mask = mask
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))

    def select(x: Tensor, size: int) -> Tensor:
        return routing_select(routing_distances(F.normalize(x.detach(), dim=-1), means), size)

    q_index = select(q, window)  # (B, H, C, W)
    if share_qk:
        k, k_index = F.normalize(q, dim=-1), q_index
    else:
        k_index = select(k, window if key_window is None else key_window)
    sizes, k_sizes = q_index.shape[2:], k_index.shape[2:]
    kept, values = (take_rows(t, k_index.flatten(2)).unflatten(2, k_sizes) for t in (k, v))
    extra = 0
    if memory_key is not None and memory_value is not None:
        extra = memory_key.shape[2]
        kept, values = (
            torch.cat((m.to(t).expand(batch, -1, -1, -1, -1), t), 3)
            for m, t in ((memory_key, kept), (memory_value, values))
        )
    scores = take_rows(q, q_index.flatten(2)).unflatten(2, sizes) @ kept.mT * dim**-0.5
    least = torch.finfo(scores.dtype).min
    apart = q_index[..., None] - k_index[..., None, :]  # (B, H, C, W, W)
    if mask is not None or key_mask is not None:
        seen = torch.ones_like(apart, dtype=torch.bool)
        for real, index in ((mask, q_index[..., None]), (key_mask, k_index[..., None, :])):
            if real is not None:
                spread = real[:, None].expand(batch, heads, -1)
                seen = seen & spread.gather(2, index.flatten(2)).view(index.shape)
        scores = scores.masked_fill(F.pad(~seen, (extra, 0)), least)
    if is_causal:
        scores = scores.masked_fill(F.pad(apart < 0, (extra, 0)), least)
    if share_qk:
        scores = scores.masked_fill(F.pad(apart == 0, (extra, 0)), _SELF)
    out = (F.dropout(scores.softmax(-1), dropout_p) @ values).flatten(2, 3)
    index = q_index.flatten(2)[..., None]
    total = torch.zeros_like(q).scatter_add(2, index.expand_as(out), out)
    count = torch.zeros_like(q[..., :1]).scatter_add(2, index, torch.ones_like(out[..., :1]))
    return (total / (count + _EPS)).to(query.dtype)


def spherical_loss(*tokens: Tensor, means: Tensor, commitment: float = 1e-4) -> Tensor:
    """Return commitment · mean (x / |x| − nearest mean)² over tokens (B, H, N, D)."""
    x = torch.cat([F.normalize(t, dim=-1) for t in tokens], 2)
    return kmeans_loss(x, means, beta=commitment)


class SphericalKMeans(FollowedCentroids):
    """Means that move towards the direction of their members' sum; unit vectors at the start.

    The first training batch places them by ten rounds of k-means; before that they are random
    directions. Steps as in :class:`OnlineKMeans`.

    Args:
        heads, clusters, dim: H, C, D.
        decay: of the moving average.
        commitment: weight of the loss.
    """

    means: Tensor
    is_placed: Tensor

    def __init__(
        self,
        heads: int,
        clusters: int,
        dim: int,
        *,
        decay: float = 0.999,
        commitment: float = 1e-4,
    ) -> None:
        super().__init__(decay)
        self.commitment = commitment
        self.register_buffer("means", F.normalize(torch.randn(heads, clusters, dim), dim=-1))
        self.register_buffer("is_placed", torch.tensor(False))

    def loss(self, *tokens: Tensor) -> Tensor:
        """Return :func:`spherical_loss` of tokens (B, H, N, D)."""
        return spherical_loss(*tokens, means=self.means, commitment=self.commitment)

    @torch.no_grad()
    def place(self, x: Tensor, *, mask: Tensor | None = None) -> None:
        """Place the means among normalised tokens (B, H, N, D), in the first training batch."""
        if not self._learns() or torch.compiler.is_compiling() or bool(self.is_placed):
            return
        flat = x.detach().transpose(0, 1).flatten(1, 2)  # (H, B N, D)
        if mask is not None:
            flat = flat[:, mask.flatten()]
        if not flat.shape[1]:
            return
        clusters = self.means.shape[1]
        chosen = torch.randperm(flat.shape[1], device=x.device)
        chosen = chosen.repeat(-(-clusters // len(chosen)))[:clusters]
        self.means.copy_(flat[:, chosen])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.means, 0)
        for _ in range(_STARTS):
            count, total = self._over_processes(*kmeans_sums(flat[None], self.means))
            self.means.copy_(self._directions(count, total))
        self.is_placed.fill_(True)

    def _sums(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return kmeans_sums(x, self.means, mask=mask)

    def _move(self, count: Tensor, total: Tensor) -> None:
        self.means.lerp_(self._directions(count, total), 1 - self.decay)

    def _directions(self, count: Tensor, total: Tensor) -> Tensor:
        new = F.normalize(total, dim=-1).to(self.means)
        return torch.where(count[..., None] > 0, new, self.means)
