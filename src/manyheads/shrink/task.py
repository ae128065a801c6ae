"""What a model is judged by: the base of all tasks, and what they have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.data.tokenizers import Tokenizer
from manyheads.shrink.data import Feed

__all__ = ["Quality", "Task", "ids_of", "logits_of", "text_of"]


@dataclass(frozen=True, slots=True)
class Quality:
    """One figure of one model.

    Attributes:
        name: of the figure.
        value: itself.
        higher_is_better: its direction.
        cache_bytes: held for one sequence after it was read token by token; None where the data
            were read otherwise.
    """

    name: str
    value: float
    higher_is_better: bool
    cache_bytes: float | None = None

    def loss_from(self, original: Quality) -> float:
        """Return how much worse it is than the original's, as a share of that."""
        worse = (
            original.value - self.value if self.higher_is_better else self.value - original.value
        )
        return worse / max(abs(original.value), 1e-12)


class Task:
    """What a model is judged by: prepared once, run on each model."""

    name: str
    higher_is_better: bool = True
    cache_bytes: float | None = None  # of the model that was measured last, see Quality

    def measure(self, model: nn.Module) -> float:
        raise NotImplementedError

    def quality(self, model: nn.Module) -> Quality:
        with torch.no_grad():
            value = self.measure(model.eval())
        return Quality(self.name, value, self.higher_is_better, self.cache_bytes)


def ids_of(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"] if "input_ids" in batch else batch["tokens"]


def text_of(feed: Feed, ids: Tensor) -> bytes:
    if feed.tokenizer is None:
        return bytes(ids.tolist())
    if isinstance(feed.tokenizer, Tokenizer):
        return feed.tokenizer.decode_bytes(ids)
    return str(feed.tokenizer.decode(ids)).encode()


def logits_of(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    logits: Tensor = found.logits if hasattr(found, "logits") else found[0]
    return logits
