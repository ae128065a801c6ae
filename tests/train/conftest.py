"""A small real text and a command line, shared by the tests of the recipes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from manyheads.cli import main

# Odd sizes: heads of 10, windows of 31, batches of 3.
TINY = {
    "mixers": "gla,softmax", "embed-dim": 20, "num-heads": 2, "length": 31, "batch-size": 3,
    "steps": 6, "eval-every": 3, "log-every": 2, "eval-tokens": 200, "learning-rate": 1e-2,
    "valid-fraction": 0.05,
}  # fmt: skip

Train = Callable[..., int]


def tiny_flags() -> list[str]:
    """The flags of the tiny model, for a command line."""
    return [word for name, value in TINY.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A source file of the standard library, 20 kB of English and Python."""
    path = tmp_path / "text.txt"
    path.write_text(Path(textwrap.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def train_lm(text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Train:
    """``train_lm("--out", folder, ...)``: the verb on that text with a tiny model."""
    monkeypatch.chdir(tmp_path)

    def train(*words: object) -> int:
        return main(["train", "lm", "--data", str(text), *tiny_flags(), *map(str, words)])

    return train
