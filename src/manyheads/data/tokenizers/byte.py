"""One token a byte."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Self

import numpy as np
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

__all__ = ["ByteTokenizer"]


class ByteTokenizer(Tokenizer):
    """One token a byte: 256 ids, and special tokens from 256 on.

    Example:
        >>> tokenizer = ByteTokenizer(specials=("<end>",))
        >>> tokenizer.encode("hé").tolist(), tokenizer.special("<end>")
        ([104, 195, 169], 256)
    """

    def __init__(self, *, specials: Sequence[str] = ()) -> None:
        check_specials(specials)
        pieces = [bytes([b]) for b in range(256)] + [b""] * len(specials)
        super().__init__(pieces, {name: 256 + i for i, name in enumerate(specials)})

    def encode(self, text: Text, *, dtype: torch.dtype = torch.int64) -> Tensor:
        if isinstance(text, Tensor):
            return check_bytes(text).to(dtype)
        data = text.encode() if isinstance(text, str) else text
        return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).to(dtype)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_json(path, {"kind": "byte", "specials": list(self.specials)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        content = read_json(path)
        if content.get("kind") != "byte":
            raise ValueError(f"{os.fspath(path)} is no byte tokenizer: use load_tokenizer")
        return cls(specials=content.get("specials", []))
