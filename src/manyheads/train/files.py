"""Files that are whole whenever the process or the machine stops."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["TEMPORARY", "replace_file", "write_json"]

# What a file's name starts with while it is written.
TEMPORARY = ".writing-"


def replace_file(temporary: Path, path: Path) -> None:
    """Move a written file to its place, so that after a crash one of the two is there, whole."""
    _sync(temporary)
    os.replace(temporary, path)
    if os.name == "posix":
        _sync(path.parent)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, atomically."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    replace_file(temporary, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
