"""Text to token ids and back: bytes, or byte-pair encoding trained on the text at hand.

Both vocabularies are made of byte strings, so every text goes through unchanged, text streams out
token by token, and a loss per token becomes bits per byte of text. V vocabulary size.
"""

from __future__ import annotations

import os

from manyheads.data.tokenizers.base import TextStream, Tokenizer, read_json
from manyheads.data.tokenizers.bpe import BPETokenizer
from manyheads.data.tokenizers.byte import ByteTokenizer

__all__ = ["BPETokenizer", "ByteTokenizer", "TextStream", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer of either kind.

    Raises:
        ValueError: no such file, or neither a byte nor a byte-level BPE tokenizer.
        MissingExtraError: a BPE tokenizer, and the package tokenizers is not installed.
    """
    return (ByteTokenizer if read_json(path).get("kind") == "byte" else BPETokenizer).load(path)
