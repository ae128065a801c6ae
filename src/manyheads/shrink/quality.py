"""How good a model is, before and after, on the data asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manyheads.compress.minilm.files import mean_pool
from manyheads.shrink.cached import CachedBits, Recall, last_cache
from manyheads.shrink.data import Feed
from manyheads.shrink.task import Quality, Task, ids_of, logits_of, text_of

__all__ = ["Quality", "Task", "embed", "task_for", "transcribe"]


class BitsPerByte(Task):
    """Bits a causal model needs for each byte of the text."""

    name, higher_is_better = "bits per byte", False

    def __init__(self, feed: Feed, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = list(batches)
        rows = [row for b in self.batches for row in ids_of(b)]
        texts = [text_of(feed, row[1:]) for row in rows]
        self.bytes = sum(len(t) for t in texts)

    def measure(self, model: nn.Module) -> float:
        total = 0.0
        for batch in self.batches:
            ids = ids_of(batch)
            logits = logits_of(model(**batch))[:, :-1].float()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            )
        return total / math.log(2) / max(1, self.bytes)


class Agreement(Task):
    """How often a model's first choice is the original's."""

    name = "agreement with the original"

    def __init__(self, original: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = list(batches)
        with torch.no_grad():
            self.choices = [logits_of(original(**b)).argmax(-1) for b in self.batches]

    def measure(self, model: nn.Module) -> float:
        same = [
            (logits_of(model(**b)).argmax(-1) == choice).flatten()
            for b, choice in zip(self.batches, self.choices, strict=True)
        ]
        return float(torch.cat(same).double().mean())


class Nearness(Task):
    """Mean cosine of a model's sentence embeddings and the original's."""

    name = "cosine to the original"

    def __init__(self, original: nn.Module, batches: Sequence[dict[str, Tensor]]) -> None:
        self.batches = list(batches)
        with torch.no_grad():
            self.wanted = [embed(original, b) for b in self.batches]

    def measure(self, model: nn.Module) -> float:
        found = [embed(model, b) for b in self.batches]
        if found[0].shape[-1] != self.wanted[0].shape[-1]:
            raise ValueError(
                "the result's embeddings have another width than the original's: judge it by "
                "--evaluate builtin:lee or builtin:verses"
            )
        cosines = [F.cosine_similarity(a, b) for a, b in zip(found, self.wanted, strict=True)]
        return float(torch.cat(cosines).mean())


class Lee(Task):
    """Spearman's correlation with how alike people find the 50 Lee documents."""

    name = "Spearman on Lee"

    def __init__(self, feed: Feed) -> None:
        from manyheads.data.lee import load_lee

        self.lee = load_lee()
        self.batches = feed.sentences(list(self.lee.documents))

    def measure(self, model: nn.Module) -> float:
        return float(self.lee.correlation(torch.cat([embed(model, b) for b in self.batches])))


class Verses(Task):
    """How often a verse's nearest in another translation is the same verse."""

    name = "verses found again"
    pairs = 512

    def __init__(self, feed: Feed) -> None:
        from manyheads.data.verses import load_verses

        pairs = list(load_verses("kjv", "web").values())
        pairs = pairs[:: len(pairs) // self.pairs][: self.pairs]
        self.sides = [feed.sentences([pair[side] for pair in pairs]) for side in (0, 1)]

    def measure(self, model: nn.Module) -> float:
        one, other = (
            F.normalize(torch.cat([embed(model, b) for b in side]), dim=-1) for side in self.sides
        )
        return float(((one @ other.mT).argmax(-1) == torch.arange(len(one))).double().mean())


class WordErrors(Task):
    """Word error rate of greedy transcripts; ``cached`` also notes what the last cache holds."""

    name, higher_is_better = "word error rate", False

    def __init__(self, feed: Feed, source: str, samples: int, *, cached: bool = False) -> None:
        from manyheads.data.speech import load_speech

        self.cached = cached
        self.feed, self.found = feed, load_speech(source, limit=samples)
        self.batches = [
            self.found[i : i + feed.batch] for i in range(0, len(self.found), feed.batch)
        ]

    def measure(self, model: Any) -> float:
        from manyheads.compress.a2sf.quality import cache_bytes
        from manyheads.data.speech import word_error_rate

        heard: list[str] = []
        held = 0.0
        for part in self.batches:
            features = self.feed.features([r.samples for r in part]).to(model.dtype)
            with last_cache(model) as seen:
                heard += transcribe(model, self.feed, features)
            if self.cached:
                held = max(held, cache_bytes(seen[-1]) / len(part))
        self.cache_bytes = held if self.cached else None
        return word_error_rate(heard, [r.text for r in self.found])


class Top1(Task):
    """Share of images whose class is named right."""

    name = "top-1"

    def __init__(self, feed: Feed, source: str, samples: int, classes: int) -> None:
        from manyheads.data.images import load_images

        data = load_images(source)
        if len(data.class_names) != classes:
            raise ValueError(
                f"{source!r} has {len(data.class_names)} classes and the model {classes}: give "
                "data of the model's own classes"
            )
        step = max(1, len(data.test) // samples)
        index = list(range(0, len(data.test), step))[:samples]
        part = data.test.take(index)
        self.labels = torch.as_tensor(part.labels)
        self.batches = feed.image_batches(list(part.images))

    def measure(self, model: nn.Module) -> float:
        chosen = torch.cat([logits_of(model(**b)).argmax(-1) for b in self.batches])
        return float((chosen == self.labels).double().mean())


def task_for(
    feed: Feed,
    original: nn.Module,
    evaluate: str,
    *,
    samples: int,
    fallback: Sequence[dict[str, Tensor]],
    cached: bool = False,
) -> Task:
    """Return the task that fits a model and the data to judge it by.

    Args:
        feed: of the model.
        original: what a result is compared with where the data have no answers.
        evaluate: data, "" for nearness to the original on ``fallback``.
        samples: pieces of data.
        fallback: batches that are there already.
        cached: read token by token, for methods that act on the cache.

    Raises:
        ValueError: data that this kind of model is not judged by.
    """
    if feed.kind == "encoder":
        if evaluate in ("builtin:lee", "builtin:verses"):
            return Lee(feed) if evaluate == "builtin:lee" else Verses(feed)
        return Nearness(original, _pieces(feed, evaluate, samples, fallback))
    if feed.kind == "speech":
        if evaluate:
            return WordErrors(feed, evaluate, samples, cached=cached)
        return Agreement(original, fallback)
    if feed.kind == "image":
        classes = _classes(original)
        if evaluate:
            return Top1(feed, evaluate, samples, classes)
        return Agreement(original, fallback)
    if feed.recall is not None:
        feed.check(evaluate)
        return Recall(feed.recall, samples, feed.batch, cached=cached)
    pieces = _pieces(feed, evaluate, samples, fallback)
    if cached:
        return CachedBits(feed, pieces)
    return BitsPerByte(feed, pieces)


def transcribe(model: Any, feed: Feed, features: Tensor, *, most: int = 64) -> list[str]:
    """Return greedy transcripts of features (B, mels, frames)."""
    ids = torch.tensor([feed.prompt]).expand(len(features), -1)
    found = model.generate(
        features,
        decoder_input_ids=ids,
        decoder_attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
    )
    texts: list[str] = feed.tokenizer.batch_decode(found, skip_special_tokens=True)
    return texts


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean of the last hidden states over real tokens, (B, C)."""
    found: Any = model(**batch)
    hidden: Tensor = found.last_hidden_state if hasattr(found, "last_hidden_state") else found[0]
    return mean_pool(hidden, batch["attention_mask"])


def _pieces(
    feed: Feed, source: str, samples: int, fallback: Sequence[dict[str, Tensor]]
) -> Sequence[dict[str, Tensor]]:
    return feed.batches(source, samples=samples, to_judge=True) if source else fallback


def _classes(model: Any) -> int:
    config = getattr(model, "config", None)
    for owner, name in ((model, "num_classes"), (config, "num_labels"), (config, "num_classes")):
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return 0
