"""Byte-level byte-pair encoding, trained on the text at hand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from manyheads.data.tokenizers.base import (
    Text,
    Tokenizer,
    check_bytes,
    check_specials,
    read_json,
    write_json,
)
from manyheads.errors import require_extra

__all__ = ["BPETokenizer"]


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding; needs the package tokenizers.

    The pre-tokens are GPT-2's (words with their leading space, numbers, punctuation, runs of
    white space), the alphabet is all 256 bytes, so nothing is unknown. Made by :meth:`train`, or
    from a ``tokenizer.json`` of the same kind, such as GPT-2's; :meth:`save` writes the same
    format, which the packages tokenizers and transformers read.

    Args:
        content: the JSON object of such a file.

    Raises:
        ValueError: another kind of tokenizer.
        MissingExtraError: tokenizers is not installed.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        require_extra("tokenizers", "train", "BPETokenizer")
        from tokenizers import Tokenizer as Model

        _check_byte_level(content)
        self._model = Model.from_str(json.dumps(content))
        # Names of special tokens that stand in a text are text.
        self._model.encode_special_tokens = True
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        inverse = {symbol: byte for byte, symbol in _byte_symbols().items()}
        pieces = []
        for i in range(self._model.get_vocab_size()):
            token = self._model.id_to_token(i) or ""
            pieces.append(b"" if token in specials else bytes(inverse[c] for c in token))
        super().__init__(pieces, specials)

    @classmethod
    def train(
        cls,
        text: Text,
        *,
        vocab_size: int = 4096,
        specials: Sequence[str] = (),
        min_frequency: int = 2,
    ) -> Self:
        """Learn the merges of a text; the same text always gives the same vocabulary.

        Args:
            text: the training text alone, not the held-out part.
            vocab_size: V, special tokens included; a short text may fill less of it.
            min_frequency: how often a pair must occur to be merged.

        Raises:
            ValueError: a vocabulary without room for the 256 bytes and the special tokens.
            MissingExtraError: tokenizers is not installed.
        """
        require_extra("tokenizers", "train", "BPETokenizer")
        check_specials(specials)
        least = 256 + len(specials)
        if vocab_size < least:
            raise ValueError(f"vocab_size {vocab_size} is below 256 bytes + specials: use {least}+")
        from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Model

        model = Model(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(specials),
            min_frequency=min_frequency,
            initial_alphabet=list(_byte_symbols().values()),
            show_progress=False,
        )
        model.train_from_iterator(_chunks(_string(text)), trainer)
        model.add_special_tokens([AddedToken(s, normalized=False) for s in specials])
        return cls(json.loads(model.to_str()))

    def encode(self, text: Text, *, dtype: torch.dtype = torch.int64) -> Tensor:
        ids: list[Tensor] = [torch.empty(0, dtype=dtype)]
        for group in _groups(_chunks(_string(text)), 64):
            for encoding in self._model.encode_batch_fast(group, add_special_tokens=False):
                ids.append(torch.tensor(encoding.ids, dtype=dtype))
        return torch.cat(ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, json.loads(self._model.to_str()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        return cls(read_json(path))


def _check_byte_level(content: dict[str, Any]) -> None:
    model, before = content.get("model") or {}, content.get("pre_tokenizer") or {}
    plain = not before.get("add_prefix_space", True) and before.get("use_regex", True)
    kind = model.get("type"), before.get("type"), content.get("normalizer")
    if kind != ("BPE", "ByteLevel", None) or not plain or "added_tokens" not in content:
        raise ValueError(
            f"tokenizer of model {kind[0]}, pre-tokenizer {kind[1]} and normalizer {kind[2]} is "
            "not byte-level BPE without normaliser or prefix space: train one with "
            "BPETokenizer.train"
        )


def _string(text: Text) -> str:
    if isinstance(text, str):
        return text
    data = check_bytes(text).numpy().tobytes() if isinstance(text, Tensor) else text
    return data.decode("utf-8")


# No pre-token of the pattern reaches from a character that is not white space over a line break,
# so cutting there changes no token, however long the text is.
_CUT = re.compile(r"(?<=\S)(?=\n)")
_CHUNK = 1 << 16


def _chunks(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _CHUNK:
        cut = _CUT.search(text, start + _CHUNK)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _groups(items: Iterable[str], size: int) -> Iterator[list[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _byte_symbols() -> dict[int, str]:
    """The printable character that byte-level BPE files write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable}
    return symbols | {b: chr(256 + i) for i, b in enumerate(others)}
