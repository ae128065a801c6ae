"""One cross-attention's cache under a policy: which of an encoder's positions stay.

An extension of ours, in none of the papers. An encoder's output is there all at once, so nothing
is sink or recent: positions stay for the attention of the first decoded tokens alone.

B batch, H query heads, G key-value heads, N new tokens, n encoder positions, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.compress.a2sf.entries import Entries, restored, stored
from manyheads.compress.a2sf.policy import CachePolicy
from manyheads.compress.a2sf.scores import accumulate, column_sums

__all__ = ["CrossState"]


class CrossState:
    """A cross-attention's cache: ``append`` once, then ``settle`` after every attention to it.

    **Lossy**. Attention is summed as the policy sums it (with forgetting, or alike, or over the
    prompt's last queries); once enough tokens were read the best positions stay, and the others'
    keys and values are gone. A budget that holds all changes nothing.

    Args:
        policy: with a ``cross_budget``.
    """

    window = None  # as of EvictionState: there is none among encoder positions

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next positions are of another encoder's output."""
        self.held: Entries | None = None
        self.seen = 0  # positions of the encoder
        self.is_decided = False
        self._read: Tensor | None = None  # (B,), real tokens that were read
        self._kind: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held: keys, values, scales and positions, and scores until they have decided."""
        return 0 if self.held is None else self.held.nbytes

    def read(self, name: str) -> Tensor | None:
        """Return "key" or "value" of the positions held, (B, G, n, D); None without any."""
        if self.held is None or self._kind is None:
            return None
        return restored(self.held, name, self._kind)

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take the encoder's keys and values, (B, G, n, D), and return them.

        Raises:
            RuntimeError: there are some already.
        """
        if self.held is not None:
            raise RuntimeError("a cross-attention's cache is filled once: reset() it first")
        batch, groups, self.seen, _ = key.shape
        self._kind = key.dtype
        places = torch.arange(self.seen, dtype=torch.int32, device=key.device)
        tensors = {"key": key, "value": value, "position": places.repeat(batch, groups, 1)}
        self.held = Entries(tensors)
        if self.policy.cross_budget(self.seen) >= self.seen:
            self._decide()
        else:
            kind = torch.promote_types(key.dtype, torch.float32)
            score = torch.zeros(batch, groups, self.seen, dtype=kind, device=key.device)
            self.held.tensors["score"] = score
        return key, value

    @torch.no_grad()
    def settle(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        real: Tensor | None = None,
        scale: float | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Take note of who was attended to, and decide where enough tokens were read.

        Args:
            query: (B, H, N, D).
            keys: (B, G, n, D), as they were attended to.
            real: (B, N), True = a real token; None: all are.
            scale: factor on the scores.
            rows: (B, H, N, n), the attention weights where they are at hand.
        """
        if self.is_decided:
            return
        held = self.held
        assert held is not None
        if real is None:
            real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        first = self._read is None  # the prompt, be it one token alone
        weights = self.policy.weights(real, prompt=first)
        if weights is not None:
            if rows is not None:
                sums = accumulate(rows, weights, keys.shape[1])
            else:
                everybody = torch.ones(1, 1, 1, self.seen, dtype=torch.bool, device=query.device)
                sums = column_sums(query, keys, weights, mask=everybody, scale=scale)
            decay = self.policy.decay(real, prompt=first).view(-1, 1, 1)
            held.tensors["score"] = held["score"] * decay + sums
        count = real.sum(1)
        self._read = count if self._read is None else self._read + count
        # Rows hold equally many: who was padded has read the fewest.
        if int(self._read.min()) >= self.policy.cross_queries:
            self._decide()

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch axis of everything held: beams that move, repeat or end."""
        if self.held is not None:
            self.held = self.held.map(change)
        if self._read is not None:
            self._read = change(self._read)

    def _decide(self) -> None:
        held = self.held
        assert held is not None
        budget = self.policy.cross_budget(self.seen)
        if budget < self.seen:
            worth = self.policy.rank(held["score"])
            order = worth.sort(stable=True, descending=True, dim=-1).indices
            held = held.keep(order[..., :budget].sort(-1).values)
        pair = stored(held["key"], held["value"], self.policy.settings.bits)
        self.held = Entries({**pair, "position": held["position"]})
        self.is_decided, self._read = True, None
