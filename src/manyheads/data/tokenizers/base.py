"""What the vocabularies share: byte strings for tokens, decoding, and bits per byte."""

from __future__ import annotations

import codecs
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from manyheads.errors import unknown_name

__all__ = ["Ids", "Text", "TextStream", "Tokenizer"]

Text = str | bytes | Tensor
Ids = int | Sequence[int] | Tensor


class Tokenizer(ABC):
    """A vocabulary of byte strings.

    Special tokens have no bytes, are never produced by :meth:`encode` (whatever the text says)
    and vanish in :meth:`decode`; their ids are in ``specials``.
    """

    def __init__(self, pieces: Sequence[bytes], specials: dict[str, int]) -> None:
        self._pieces = tuple(pieces)
        self.specials = specials
        self.token_bytes = torch.tensor([len(p) for p in self._pieces])  # (V,)

    @property
    def vocab_size(self) -> int:
        """V, special tokens included."""
        return len(self._pieces)

    @abstractmethod
    def encode(self, text: Text, *, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return the ids (N,) of a string, UTF-8 bytes, or bytes held in a uint8 tensor."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vocabulary as one JSON file, for :func:`load_tokenizer`."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what :meth:`save` wrote."""

    def decode(self, ids: Ids) -> str:
        """Return the text; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Ids) -> bytes:
        """Return the bytes of the tokens, the exact inverse of :meth:`encode`."""
        numbers = _numbers(ids)
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"token id {number} is outside the vocabulary [0, {self.vocab_size})"
                )
        return b"".join(self._pieces[n] for n in numbers)

    def stream(self) -> TextStream:
        """Return a decoder that takes ids as they come."""
        return TextStream(self)

    def special(self, name: str) -> int:
        """Return the id of a special token.

        Raises:
            ValueError: no such token; the nearest is named.
        """
        if name not in self.specials:
            raise unknown_name("special token", name, self.specials)
        return self.specials[name]

    def count_bytes(self, ids: Tensor) -> int:
        """Return how many bytes of text the ids stand for; negative ids (not scored) are none."""
        flat = ids.flatten().long()
        return int(self.token_bytes[flat[flat >= 0].cpu()].sum())

    def bytes_per_token(self, ids: Tensor) -> float:
        """Return the mean number of bytes a token stands for."""
        scored = int((ids >= 0).sum())
        return self.count_bytes(ids) / scored if scored else math.nan

    def bits_per_byte(self, nats: float, targets: Tensor) -> float:
        """Turn a summed cross-entropy into bits per byte, comparable between vocabularies.

        Args:
            nats: sum (not mean) of the losses at the scored targets.
            targets: the targets of those losses; negative ones were not scored.
        """
        count = self.count_bytes(targets)
        return nats / math.log(2) / count if count else math.nan


class TextStream:
    """Turns ids into text as they come; holds back the bytes of an unfinished character.

    The pushed texts and the flushed rest, joined, equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Ids) -> str:
        """Return the characters that the new ids complete."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """Return what was held back (U+FFFD for a broken character) and start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _numbers(ids: Ids) -> list[int]:
    if isinstance(ids, int):
        return [ids]
    return ids.flatten().tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]


def check_specials(specials: Sequence[str]) -> None:
    if len(set(specials)) != len(specials) or "" in specials:
        raise ValueError(f"special tokens {list(specials)}: give each a name of its own")


def check_bytes(text: Tensor) -> Tensor:
    if text.dtype != torch.uint8 or text.ndim != 1:
        raise ValueError(
            f"text tensor of {text.dtype} and shape {tuple(text.shape)}: give uint8 bytes (N,)"
        )
    return text


def write_json(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is no readable tokenizer file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} is no tokenizer file: it holds no JSON object")
    return content
