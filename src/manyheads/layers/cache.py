"""Key-value caches that grow, and the place of those that do not.

B batch, H heads, H_kv key-value heads, N new tokens, n all tokens at hand, D and V head dims.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.layers.state import StateObject

__all__ = ["KeptCache", "append_tokens"]

_ROOM = 256  # least number of free places when a cache grows


class KeptCache(StateObject):
    """A cache that chooses which tokens it holds, in the place of one that grows.

    Attributes:
        length: (B,) real tokens that were read, held or not: the position of the next one.
    """

    length: Tensor

    def expect(self, prompt: int) -> None:
        """Learn how long a prompt is that comes in several blocks."""
        raise NotImplementedError

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *,
        first: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        later: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Return what the new tokens read, (B, H, N, V), and keep of them what is to be kept.

        Args:
            query: (B, H, N, D); key, value: (B, H_kv, N, D and V), of the new tokens.
            mask: (B, N), True = a real token.
            first: causal attention of the new tokens to each other, given ``mask``.
            later: attention to (B, H_kv, n, D and V), given who sees whom, broadcast to
                (B, H, N, n); None: all see all.
        """
        raise NotImplementedError


def append_tokens(
    keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Put new tokens behind those of each row; a full cache doubles.

    Args:
        keys, values: (B, H_kv, capacity, D and V); written in place where there is room and
            nothing is differentiated.
        lengths: (B,) tokens held in each row.
        key, value: (B, H_kv, N, D and V).

    Returns:
        The caches, the same tensors or larger ones.
    """
    start, high = int(lengths.min()), int(lengths.max())
    length = key.shape[2]
    need, capacity = high + length, keys.shape[2]
    differentiable = key.requires_grad or value.requires_grad or keys.requires_grad
    if need > capacity or differentiable:
        size = need if differentiable or high == 0 else max(2 * capacity, need, _ROOM)
        keys, values = (_grow(old, size, high) for old in (keys, values))
    if start == high:
        keys[:, :, high:need] = key
        values[:, :, high:need] = value
        return keys, values
    rows = torch.arange(key.shape[0], device=key.device)[:, None]
    places = lengths[:, None] + torch.arange(length, device=key.device)  # (B, N)
    keys[rows, :, places] = key.transpose(1, 2)
    values[rows, :, places] = value.transpose(1, 2)
    return keys, values


def _grow(old: Tensor, size: int, used: int) -> Tensor:
    new = old.new_zeros(old.shape[0], old.shape[1], size, old.shape[3])
    new[:, :, :used] = old[:, :, :used]
    return new
