"""Online spherical k-means: the centroids that routing attention compares with.

B batch, H heads, N length, D head dim, C clusters. Inputs are normalised already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyheads.attention.routing.definition import (
    routing_distances,
    routing_normalize,
)

__all__ = [
    "FollowedCentroids",
    "KMeansState",
    "OnlineKMeans",
    "kmeans_loss",
    "kmeans_sums",
    "kmeans_update",
    "widened",
]

_EPS = 1e-5


class KMeansState(NamedTuple):
    """``means`` (H, C, D), and the averages behind them, (H, C) and (H, C, D)."""

    means: Tensor
    ema_count: Tensor
    ema_means: Tensor


def kmeans_loss(
    x: Tensor, means: Tensor, *, beta: float, ema: bool = True, mask: Tensor | None = None
) -> Tensor:
    """Return beta · mean (x − nearest centroid)², which pulls tokens to their centroid.

    Without ``ema`` the same distance is added once with its gradient to the centroids.

    Args:
        x: (B, H, N, D).
        means: (H, C, D).
        mask: (B, N), True = a token that counts.
    """
    nearest = _nearest(x, means)
    clusters = means.shape[1]
    base = torch.arange(means.shape[0], device=x.device).view(1, -1, 1) * clusters
    rows = means.to(x).flatten(0, 1)[nearest + base]  # (B, H, N, D)
    loss = beta * _mean_square(x - rows.detach(), mask)
    return loss if ema else loss + _mean_square(x.detach() - rows, mask)


def kmeans_sums(
    x: Tensor, means: Tensor, *, mask: Tensor | None = None, mixed_counts: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the number (H, C) and the sum (H, C, D) of the members of each cluster.

    All-zero rows are padding and belong to none. ``mixed_counts``: count as the published code
    does, whose reshape gives the tokens of all heads to heads by turns; its sums are by head.
    """
    nearest = _nearest(x, means)
    real = (x != 0).any(-1)
    if mask is not None:
        real = real & mask[:, None]
    heads, clusters, dim = means.shape
    base = torch.arange(heads, device=x.device).view(1, -1, 1) * clusters
    index = (nearest + base).flatten()
    weight = real.to(x)
    counted = index
    if mixed_counts:
        turn = torch.arange(nearest.numel(), device=x.device) % heads
        counted = nearest.flatten() + turn * clusters
    count = x.new_zeros(heads * clusters).index_add(0, counted, weight.flatten())
    rows = (x * weight[..., None]).reshape(-1, dim)
    total = x.new_zeros(heads * clusters, dim).index_add(0, index, rows)
    return count.view(heads, clusters), total.view(heads, clusters, dim)


def kmeans_update(state: KMeansState, count: Tensor, total: Tensor, *, decay: float) -> KMeansState:
    """Return the state after one step of moving averages; a cluster without members stays."""
    ema_count = decay * state.ema_count + (1 - decay) * count
    ema_means = decay * state.ema_means + (1 - decay) * total
    everything = ema_count.sum(-1, keepdim=True)
    size = (ema_count + _EPS) / (everything + ema_count.shape[-1] * _EPS) * everything
    return KMeansState(ema_means / size[..., None], ema_count, ema_means)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    return routing_distances(x.detach(), means.detach()).argmin(-1)


def _mean_square(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.square().mean()
    share = mask.to(x)[:, None, :, None]
    return (x.square() * share).sum() / (share.sum() * x.shape[1] * x.shape[3]).clamp_min(1)


class FollowedCentroids(nn.Module):
    """Centroids that follow what they are shown, one step for each optimizer step.

    ``observe`` adds a batch to sums that wait. They are applied, summed over the processes of
    torch.distributed, by ``update_centroids``, or by the first batch that is shown after the
    watched parameters changed: micro-batches of gradient accumulation give one step, and the
    forward pass that activation checkpointing repeats adds nothing. Under torch.compile, where
    neither can be seen, every training batch is a step of its own.
    """

    follows = True

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        # Not buffers: DistributedDataParallel copies the buffers of the first process to all.
        self._waiting: tuple[Tensor, Tensor] | None = None
        self._versions: tuple[int, ...] = ()

    def _sums(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the numbers (H, C) and sums (H, C, D) of members."""
        raise NotImplementedError

    def _move(self, count: Tensor, total: Tensor) -> None:
        """Make one step."""
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self, watched: Iterable[nn.Parameter]) -> None:
        """Apply what waits if a watched parameter was changed since; call before a forward."""
        if not self._learns() or torch.compiler.is_compiling():
            return
        versions = tuple(p._version for p in watched)
        if versions != self._versions:
            self.update_centroids()
            self._versions = versions

    @torch.no_grad()
    def observe(self, x: Tensor, *, mask: Tensor | None = None) -> None:
        """Add normalised tokens (B, H, N, D) to the sums, in training mode only."""
        if not self._learns():
            return
        with torch.autocast(x.device.type, enabled=False):
            count, total = self._sums(widened(x.detach()), mask)
        if torch.compiler.is_compiling():
            self._move(*self._over_processes(count, total))
        elif self._waiting is None:
            self._waiting = count, total
        else:
            self._waiting = count + self._waiting[0], total + self._waiting[1]

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Move the centroids by what was observed; every process of a group has to call it."""
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            self._move(*self._over_processes(*waiting))

    @staticmethod
    def _over_processes(count: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = torch.cat((count[..., None], total), -1)
            torch.distributed.all_reduce(sums)
            return sums[..., 0], sums[..., 1:]
        return count, total

    def _learns(self) -> bool:
        """Whether this is training, and not the repeated forward inside a backward pass."""
        if not (self.follows and self.training):
            return False
        return torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move and cast as usual, but keep the averages in float32 at least."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device))
        if self._waiting is not None:
            device = next(self.buffers()).device
            self._waiting = self._waiting[0].to(device), self._waiting[1].to(device)
        return self


class OnlineKMeans(FollowedCentroids):
    """The paper's centroids: moving averages of the sums and numbers of their members.

    Args:
        heads, clusters, dim: H, C, D.
        decay: of the averages.
        beta: weight of the loss.
        ema: False: the centroids are a parameter, trained by the gradient of ``loss``.
        mixed_counts: as in :func:`kmeans_sums`.
    """

    means: Tensor
    ema_count: Tensor
    ema_means: Tensor

    def __init__(
        self,
        heads: int,
        clusters: int,
        dim: int,
        *,
        decay: float = 0.999,
        beta: float = 1e-4,
        ema: bool = True,
        mixed_counts: bool = False,
    ) -> None:
        super().__init__(decay)
        self.beta, self.follows, self.mixed_counts = beta, ema, mixed_counts
        means = routing_normalize(torch.randn(heads, clusters, dim))
        if ema:
            self.register_buffer("means", means)
            self.register_buffer("ema_count", torch.zeros(heads, clusters))
            self.register_buffer("ema_means", means.clone())
        else:
            self.means = nn.Parameter(means)

    def forward(self, x: Tensor) -> Tensor:
        """Return the distances (B, H, N, C) of normalised x (B, H, N, D)."""
        return routing_distances(x, self.means)

    def loss(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return :func:`kmeans_loss` of normalised x (B, H, N, D)."""
        with torch.autocast(x.device.type, enabled=False):
            return kmeans_loss(widened(x), self.means, beta=self.beta, ema=self.follows, mask=mask)

    def _sums(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        return kmeans_sums(x, self.means, mask=mask, mixed_counts=self.mixed_counts)

    def _move(self, count: Tensor, total: Tensor) -> None:
        old = KMeansState(self.means, self.ema_count, self.ema_means)
        new = kmeans_update(old, count.to(old.means), total.to(old.means), decay=self.decay)
        for buffer, value in zip(old, new, strict=True):
            buffer.copy_(value)

    def extra_repr(self) -> str:
        heads, clusters, dim = self.means.shape
        return f"heads={heads}, clusters={clusters}, dim={dim}, decay={self.decay}"


def widened(x: Tensor) -> Tensor:
    """Return x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
