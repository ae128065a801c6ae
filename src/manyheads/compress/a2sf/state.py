"""One layer's cache under a policy: what is held, who sees what, and which tokens go.

B batch, H query heads, G key-value heads, N new tokens, n all tokens at hand, D head dim. Heads
hold different tokens but equally many; "position" says which, counted from the first token that
the layer saw, padding included, unless :meth:`EvictionState.append` is told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.compress.a2sf.entries import Entries, dequantise, restored, stored
from manyheads.compress.a2sf.policy import CachePolicy
from manyheads.compress.a2sf.scores import accumulate, column_sums

__all__ = ["EvictionState", "Rotate"]

Rotate = Callable[[Tensor, Tensor], Tensor]


class EvictionState:
    """A layer's cache: ``append``, attend with ``mask``, then ``settle``, at every call.

    Args:
        policy: says which tokens stay.
        layer: its number, for budgets by layer.
        window: a query sees keys at a distance below it; None for all.
        rotate: ``rotate(keys, shift)`` moves rotary keys (B, G, n, D) by ``shift`` (B, G, n)
            positions; needed where the policy moves keys.
        prompt: tokens of the prompt where it is read in chunks and the budget is a share of it.

    Raises:
        ValueError: a policy that moves keys without ``rotate``.
    """

    def __init__(
        self,
        policy: CachePolicy,
        layer: int = 0,
        *,
        window: int | None = None,
        rotate: Rotate | None = None,
        prompt: int | None = None,
    ) -> None:
        if policy.rotates and rotate is None:
            raise ValueError(
                f"{policy.name} moves keys to other rotary positions and no rotation was given: "
                "use sink-recent where positions are learned"
            )
        self.policy, self.layer, self.window, self.rotate = policy, layer, window, rotate
        self.prompt = prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next tokens begin a new text."""
        self.held: Entries | None = None
        self.seen = 0
        self.budget: int | None = None
        self._ragged = False  # heads hold different tokens
        self._padded = False
        self._now: Entries | None = None
        self._new = 0
        self._real: Tensor | None = None
        self._kind: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held, scales, positions and scores included."""
        return 0 if self.held is None else self.held.nbytes

    @property
    def real(self) -> Tensor | None:
        """Which of the newest tokens are real, (B, N); None before there are any."""
        return self._real

    def read(self, name: str) -> Tensor | None:
        """Return "key" or "value" of the tokens held, (B, G, n, D); None before there are any."""
        if self.held is None:
            return None
        assert self._kind is not None
        return restored(self.held, name, self._kind)

    @torch.no_grad()
    def append(
        self, key: Tensor, value: Tensor, *, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to: those held, then the new ones.

        Args:
            key, value: (B, G, N, D), of the new tokens.
            places: (B, N), their positions, where padding is not counted; always or never.

        Raises:
            RuntimeError: the tokens before were never settled.
        """
        if self._now is not None:
            raise RuntimeError(
                "tokens were added to an evicting cache and never attended to: use it inside "
                "'with policy.attach(model)', and give it to that model alone"
            )
        batch, groups, new, _ = key.shape
        # What is held may not keep a larger tensor alive that these are views of.
        key, value = key.contiguous(), value.contiguous()
        self._kind = key.dtype
        if self.budget is None:
            self.budget = self.policy.budget(self.layer, self.prompt or new)
        if places is None:
            places = torch.arange(self.seen, self.seen + new, device=key.device)[None]
        places = places[:, None].to(torch.int32)
        tensors = stored(key, value, self.policy.settings.bits)
        tensors["position"] = places.expand(batch, groups, -1).contiguous()
        tensors["valid"] = torch.ones(batch, groups, new, dtype=torch.bool, device=key.device)
        if self.policy.needs_scores:
            kind = torch.promote_types(key.dtype, torch.float32)
            tensors["score"] = torch.zeros(batch, groups, new, dtype=kind, device=key.device)
        fresh = Entries(tensors)
        held, self._new = self.held, new
        self.seen += new
        if held is None or len(held) == 0:
            self._now = fresh
            return key, value
        self._now = held.append(fresh)
        keys, values = self._read(self._now, key, value)
        if self.rotate is not None and self._ragged:
            keys = self._moved(keys, held, places[:, :, :1].long())
        return keys, values

    def mask(self, mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Return who sees whom among all tokens at hand, for the attention function.

        Also learns which of the new tokens are padding.

        Args:
            mask: of the new tokens among themselves, (B or 1, 1, N, at least N), True = sees, or
                a bias whose lowest number is "does not"; None for causality alone.
            query: (B, H, N, D).

        Returns:
            None where causality says it all; else True = sees (a bias if ``mask`` is one),
            broadcast to (B, H, N, n).
        """
        new = self._new
        sees = _as_bool(mask)
        self._learn(sees, query.shape[0])
        now = self._now
        assert now is not None
        old = len(now) - new
        if old == 0:
            return mask
        if not self._padded and self.window is None and new == 1:
            return None
        valid = now["valid"] if self._ragged else now["valid"][:, :1]
        before = valid[:, :, None, :old].expand(-1, -1, new, -1)
        if self.window is not None:
            where = now["position"] if self._ragged else now["position"][:, :1]
            at = torch.arange(self.seen - new, self.seen, device=query.device)
            before = before & (at[:, None] - where[:, :, None, :old] < self.window)
        if sees is None:
            among = torch.ones(new, new, dtype=torch.bool, device=query.device).tril()
        else:
            among = sees[..., -new:]
        among = among.expand(*before.shape[:3], new)
        whole = torch.cat((before, among), -1)
        if self._ragged:
            whole = whole.repeat_interleave(query.shape[1] // whole.shape[1], 1)
        if mask is None or mask.dtype == torch.bool:
            return whole
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        return torch.where(whole, zero, torch.finfo(query.dtype).min)

    @torch.no_grad()
    def settle(
        self,
        query: Tensor,
        keys: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Take note of who was attended to, and evict what the budget does not hold.

        Args:
            query: (B, H, N, D).
            keys: (B, G, n, D), as :meth:`append` returned them.
            mask: as :meth:`mask` returned it.
            scale: factor on the scores.
            rows: (B, H, N, n), the attention weights where they are at hand.
        """
        now, prompt = self._now, self._new > 1
        assert now is not None
        assert self._real is not None
        if self.policy.needs_scores:
            scores = now["score"] * self.policy.decay(self._real, prompt=prompt).view(-1, 1, 1)
            weights = self.policy.weights(self._real, prompt=prompt)
            if weights is not None and rows is not None:
                scores = scores + accumulate(rows, weights, keys.shape[1])
            elif weights is not None:
                scores = scores + column_sums(query, keys, weights, mask=mask, scale=scale)
            now.tensors["score"] = scores
        self._now = None
        self.held = self._evicted(now) if prompt or self.policy.settings.decode else now

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the batch axis of everything held: beams that move, repeat or end."""
        if self.held is not None:
            self.held = self.held.map(change)

    def _read(self, now: Entries, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.policy.settings.bits is None:
            return now["key"], now["value"]
        pair = []
        for name, new in (("key", key), ("value", value)):
            # New tokens are attended to as they are, and rounded for those that come later.
            past = slice(0, len(now) - new.shape[2])
            old = dequantise(now[name][:, :, past], now[name + "_scale"][:, :, past], new.dtype)
            pair.append(torch.cat((old, new), 2))
        return pair[0], pair[1]

    def _moved(self, keys: Tensor, held: Entries, first: Tensor) -> Tensor:
        """Turn held keys so that no position is missing between them and the first new one."""
        assert self.rotate is not None
        # Without padding all but the first tokens are next to each other.
        some = len(held) if self._padded else self.policy.split(len(held)).sink
        valid = held["valid"].long()
        after = valid.flip(-1).cumsum(-1).flip(-1)
        shift = (first - after - held["position"])[:, :, :some]
        moved = self.rotate(keys[:, :, :some], shift)
        return torch.cat((moved, keys[:, :, some:]), 2)

    def _learn(self, sees: Tensor | None, batch: int) -> None:
        now, new = self._now, self._new
        assert now is not None
        device = now["valid"].device
        if sees is None:
            self._real = torch.ones(batch, new, dtype=torch.bool, device=device)
            return
        own = sees[:, 0, :, -new:].diagonal(dim1=-2, dim2=-1)
        self._real = own.expand(batch, new)
        if not bool(own.all()):
            self._padded = True
            fresh = self._real[:, None].expand(-1, now["valid"].shape[1], -1)
            now.tensors["valid"] = torch.cat((now["valid"][:, :, :-new], fresh), 2)

    def _evicted(self, now: Entries) -> Entries:
        assert self.budget is not None
        count = len(now)
        gone = count - self.budget
        if gone <= 0:
            return now
        self._ragged = True
        worth = self._worth(now)
        if gone == 1:
            drop = worth.argmin(-1, keepdim=True)
            place = torch.arange(count - 1, device=worth.device)
            return now.keep(place + (place >= drop).long())
        order = worth.sort(stable=True, dim=-1).indices
        return now.keep(order[..., gone:].sort(-1).values)

    def _worth(self, now: Entries) -> Tensor:
        """Return what decides who stays, (B, G, n): the least goes first, of equals the oldest."""
        split = self.policy.split(self.budget or 0)
        valid, count = now["valid"], len(now)
        if self.policy.needs_scores:
            worth = self.policy.rank(now["score"]).clone()
        else:
            worth = torch.zeros(valid.shape, device=valid.device)
        if not self._padded:
            worth[:, :, : split.sink] = torch.inf
            worth[:, :, count - split.recent :] = torch.inf
        else:
            number = valid.long().cumsum(-1)
            from_end = number[..., -1:] - number
            held = (number <= split.sink) | (from_end < split.recent)
            worth = worth.masked_fill(held, torch.inf).masked_fill(~valid, -torch.inf)
        if self.window is not None:
            # The next query is at self.seen.
            worth = worth.masked_fill(self.seen - now["position"] >= self.window, -torch.inf)
        return worth


def _as_bool(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
