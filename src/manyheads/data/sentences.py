"""Sentences to train encoders on: verses, news items, bags of words, or your own text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from manyheads.data.lee import load_lee
from manyheads.data.seeding import generator
from manyheads.data.text import load_text
from manyheads.data.verses import load_verses

__all__ = ["Sentences", "bags_of_words", "load_sentences"]

_BAG_SIZES = (3, 20)


class Sentences(NamedTuple):
    """Texts without repetitions, a line on what they are, and the hash of all of them."""

    texts: tuple[str, ...]
    description: str
    sha256: str


def load_sentences(
    sources: Sequence[str], *, vocabulary: Iterable[str] = (), bags: int = 10_000, seed: int = 0
) -> Sentences:
    """Read sentences from several sources.

    Args:
        sources: "verses" (King James and World English), "lee" (sentences of the 300 Lee items
            that nobody judged), "words" (bags of words, see :func:`bags_of_words`), or what
            :func:`load_text` reads, cut into sentences.
        vocabulary: the words of "words".
        bags: how many of them.
        seed: of the bags.

    Raises:
        ValueError: no sources, an unreadable one, or "words" without a vocabulary.
        MissingExtraError: the package of a source is not installed.
    """
    if not sources:
        raise ValueError("data is empty: give verses, lee, words or a text")
    texts: list[str] = []
    said = []
    for name in sources:
        if name == "verses":
            found = [t for pair in load_verses("kjv", "web").values() for t in pair]
        elif name == "lee":
            found = [s for item in load_lee().background for s in _split(item)]
        elif name == "words":
            found = bags_of_words(vocabulary, bags, seed=seed)
        else:
            lines = load_text(name).data.decode().splitlines()
            found = [s for line in lines for s in _split(line.strip())]
        texts += found
        said.append(f"{len(found):,} of {name}")
    unique = tuple(dict.fromkeys(texts))
    digest = hashlib.sha256("\n".join(unique).encode()).hexdigest()
    return Sentences(unique, ", ".join(said), digest)


def bags_of_words(vocabulary: Iterable[str], count: int, *, seed: int = 0) -> list[str]:
    """Return ``count`` lines of 3 to 20 words drawn alike from a vocabulary.

    They mean nothing, but every word of the vocabulary occurs, which no small corpus gives.

    Raises:
        ValueError: fewer than two words of letters in the vocabulary.
    """
    words = sorted({w for w in vocabulary if len(w) > 1 and w.isascii() and w.isalpha()})
    if len(words) < 2:
        raise ValueError("'words' needs a vocabulary with words of two or more letters")
    draw = generator(seed, 0)
    sizes = draw.integers(*_BAG_SIZES, size=count)
    return [" ".join(words[i] for i in draw.integers(len(words), size=n)) for n in sizes]


def _split(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 3]
