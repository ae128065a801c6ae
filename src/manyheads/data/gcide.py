"""The Collaborative International Dictionary of English: much running English, of one package.

Debian's ``dict-gcide`` ships it as ``/usr/share/dictd/gcide.dict.dz`` (GPL); the text is that of
Webster's of 1913 and additions. Who is no root unpacks the package anywhere and names the file.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from pathlib import Path

from manyheads.errors import MissingExtraError

__all__ = ["GCIDE", "gcide_text"]

GCIDE = Path("/usr/share/dictd/gcide.dict.dz")
# Who wrote a paragraph: after nearly every one, and nothing to learn from.
_ORIGIN = re.compile(
    r"\s*\[(?:\d{4} Webster|Webster \d{4} Suppl\.|WordNet [\d.]+|Century Dict\.[^\]]*|PJC|AS)"
    r"(?: ?\+ ?(?:PJC|AS|WordNet [\d.]+))?\]"
)
_ENTRY = re.compile(r"\n\n(?=\S)")  # the paragraphs of an entry are indented


def gcide_text(max_bytes: int | None = None, path: Path | None = None) -> tuple[bytes, str]:
    """Return the dictionary's entries, an empty line between them, and a line that says what it is.

    Entries follow each other in the order of their hashes, so the end of the text is of the same
    kind as its start. The notice before the first and the marks of origin are left out.

    Args:
        max_bytes: about as many are returned, whole entries.
        path: of the file, where it is not Debian's.

    Raises:
        MissingExtraError: the file is not there; says how to get it.
        ValueError: it is no such dictionary.
    """
    path = path or GCIDE
    if not path.is_file():
        raise MissingExtraError(
            f"builtin:gcide needs {path}, which is not there: apt-get install dict-gcide, or "
            "unpack the package (dpkg-deb -x) and give the path of its gcide.dict.dz"
        )
    try:
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data {str(path)!r} cannot be unpacked ({error}): get it anew") from None
    # A few bytes of the file are of another encoding.
    entries = _ENTRY.split(_ORIGIN.sub("", text.replace("�", "'")))
    first = next((i for i, e in enumerate(entries) if " \\" in e.partition("\n")[0]), None)
    if first is None:
        raise ValueError(f"data {str(path)!r} holds no entries of a dictionary: give dict-gcide's")
    ordered = sorted(
        (e.strip() for e in entries[first:]), key=lambda e: hashlib.sha256(e.encode()).digest()
    )
    pieces, total = [], 0
    for entry in filter(None, ordered):
        if max_bytes is not None and total >= max_bytes:
            break
        pieces.append(entry.encode())
        total += len(pieces[-1]) + 2
    said = f"Collaborative International Dictionary of English, {len(pieces)} entries"
    return b"\n\n".join(pieces) + b"\n", said
