"""Tasks that read token by token, as generation does: what a cache has forgotten is missed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from manyheads.shrink.data import Feed
from manyheads.shrink.recall import RecallRun, answered
from manyheads.shrink.task import Task, ids_of, text_of

__all__ = ["CachedBits", "Recall", "last_cache"]


class CachedBits(Task):
    """Bits a causal model needs for each byte of the second half of a piece.

    Tokens are read one by one after the first half, as ``generate()`` reads them, so that what a
    cache has forgotten is missed.
    """

    name, higher_is_better = "bits per byte with its cache", False

    def __init__(self, feed: Feed, batches: Sequence[dict[str, Tensor]]) -> None:
        self.rows = [ids_of(b) for b in batches]
        self.prompt = self.rows[0].shape[1] // 2
        scored = [ids[self.prompt :] for rows in self.rows for ids in rows]
        self.bytes = sum(len(text_of(feed, ids)) for ids in scored)

    def measure(self, model: nn.Module) -> float:
        from manyheads.compress.a2sf.quality import continuation_loss

        nats, self.cache_bytes = 0.0, 0.0
        for ids in self.rows:
            losses, held = continuation_loss(model, ids, prompt=self.prompt)
            nats += float(losses.sum())
            self.cache_bytes = max(self.cache_bytes, held / len(ids))
        return nats / math.log(2) / max(1, self.bytes)


class Recall(Task):
    """Share of queries answered right, on sequences that the run has never seen.

    ``cached``: the pairs are read at once and what follows token by token, so that what a cache
    has forgotten is missed.
    """

    name = "queries answered"

    def __init__(self, run: RecallRun, samples: int, batch: int, *, cached: bool) -> None:
        self.batches = run.batches(samples, batch, held_out=True)
        self.prompt = 2 * run.task.pairs if cached else None
        if cached:
            self.name = "queries answered with its cache"

    def measure(self, model: nn.Module) -> float:
        from manyheads.compress.a2sf.own import held_bytes

        right, count, held = 0, 0, 0.0
        for batch in self.batches:
            answers, states = answered(model, batch.inputs, prompt=self.prompt)
            right += int((answers == batch.targets).sum())
            count += int((batch.targets >= 0).sum())
            held = max(held, held_bytes(states) / len(batch.inputs))
        self.cache_bytes = None if self.prompt is None else held
        return right / count


@contextmanager
def last_cache(model: nn.Module) -> Iterator[list[Any]]:
    """Give a list whose one entry is the cache that the model's last call returned."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen[:] = [getattr(output, "cache", None)]

    handle = model.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
