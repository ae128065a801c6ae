"""Partial results of softmax attention and the operator that merges them.

B batch, H heads, R rows of queries, M keys, D head dim, V value dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Partial", "empty_partial", "merge_partials", "partial_attention"]


class Partial(NamedTuple):
    """Softmax attention of queries over a part of the keys, not yet divided.

    ``m`` (..., R) the largest score, ``l`` (..., R) the sum of e^(s - m), ``o`` (..., R, V) the
    sum of e^(s - m) v. A part without keys is (-inf, 0, 0), the identity of the merge.
    """

    m: Tensor
    l: Tensor  # noqa: E741
    o: Tensor

    @property
    def out(self) -> Tensor:
        """(..., R, V): the attention over these keys; 0 where there is none."""
        return self.o / self.l.masked_fill(self.l == 0, 1)[..., None]

    @property
    def lse(self) -> Tensor:
        """(..., R): the logarithm of the sum of e^s; -inf where there is no key."""
        return self.m + self.l.log()


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None
) -> Partial:
    """Attend to a part of the keys. Exact once all parts are merged; differentiable.

    Args:
        query: (..., R, D).
        key: (..., M, D); value: (..., M, V); M may be 0.
        scale: factor on the scores, D ** -0.5 unless given.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * scale
    if key.shape[-2] == 0:
        m = scores.new_full(scores.shape[:-1], -torch.inf)
    else:
        m = scores.detach().amax(-1)
    weights = (scores - _finite(m)[..., None]).exp()
    return Partial(m, weights.sum(-1), weights @ value)


def empty_partial(*rows: int, dim: int, like: Tensor) -> Partial:
    """Return the identity of the merge, (``rows``) and (``rows``, ``dim``)."""
    return Partial(
        like.new_full(rows, -torch.inf), like.new_zeros(rows), like.new_zeros(*rows, dim)
    )


def merge_partials(
    partial: Partial, segment_ids: Tensor | None = None, *, count: int | None = None
) -> Partial:
    """Merge partial results along their first axis: exact, whatever the sizes of the parts.

    The operator is associative and commutative up to rounding. Parts may come from workers,
    pages or devices: gather each device's (m, l, o), stack them, merge.

    Args:
        partial: S parts, (S, ..., R) and (S, ..., R, V).
        segment_ids: (S,) the result that each part belongs to (None: all to one).
        count: number of results (None: the largest id and one more); those without a part are
            the identity.

    Returns:
        (count, ..., R) and (count, ..., R, V), or without the first axis if there are no ids.

    Raises:
        ValueError: ids of another length than the parts, or an id not below ``count``.

    Example:
        >>> q, k, v = torch.randn(3, 8), torch.randn(10, 8), torch.randn(10, 8)
        >>> parts = [partial_attention(q, k[a:b], v[a:b]) for a, b in ((0, 1), (1, 10))]
        >>> merge_partials(Partial(*map(torch.stack, zip(*parts)))).out.shape
        torch.Size([3, 8])
    """
    if segment_ids is None:
        m = (
            partial.m.amax(0)
            if len(partial.m)
            else partial.m.new_full(partial.m.shape[1:], -torch.inf)
        )
        weights = (partial.m - _finite(m)).exp()
        return Partial(m, (weights * partial.l).sum(0), (weights[..., None] * partial.o).sum(0))
    if segment_ids.shape != partial.m.shape[:1]:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}, expected ({len(partial.m)},): "
            "one id for each part"
        )
    most = int(segment_ids.max()) + 1 if len(segment_ids) else 0
    count = most if count is None else count
    if most > count or (len(segment_ids) and int(segment_ids.min()) < 0):
        raise ValueError(f"segment_ids reach from {int(segment_ids.min())} to {most - 1}: "
                         f"give ids from 0 to count - 1 = {count - 1}")  # fmt: skip
    rows = segment_ids.view(-1, *[1] * (partial.m.ndim - 1)).expand_as(partial.m)
    m = partial.m.new_full((count, *partial.m.shape[1:]), -torch.inf)
    m = m.scatter_reduce(0, rows, partial.m.detach(), "amax")
    weights = (partial.m - _finite(m)[segment_ids]).exp()
    zeros = partial.l.new_zeros(m.shape), partial.o.new_zeros(count, *partial.o.shape[1:])
    return Partial(
        m,
        zeros[0].index_add(0, segment_ids, weights * partial.l),
        zeros[1].index_add(0, segment_ids, weights[..., None] * partial.o),
    )


def _finite(m: Tensor) -> Tensor:
    """Return what is subtracted: e^(-inf - 0) is 0, where e^(-inf + inf) would be NaN."""
    return m.masked_fill(m == -torch.inf, 0)
