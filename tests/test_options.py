"""Flags from dataclasses, and configs that refuse what they do not know."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Literal

import pytest

from manyheads.config import Config
from manyheads.errors import MissingExtraError, nearest, require_extra
from manyheads.options import add_flags, read_flags, seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Options(Config):
    """An example.

    Attributes:
        words: what to read,
            one or more.
        length: how long, 100% exact.
        rate: how fast.
        budget: how much time.
        names: which ones.
        kind: of which sort.
        loud: whether to shout.
        note: anything.
    """

    words: tuple[str, ...] = field(default=(), metadata={"positional": True})
    length: int = 7
    rate: float | None = None
    budget: float = field(default=300.0, metadata={"unit": "seconds"})
    names: tuple[str, ...] = ("a", "b")
    kind: Literal["x", "y"] = field(default="x", metadata={"choices": ("x", "y")})
    loud: bool = False
    note: str | None = None

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ValueError("length is negative")


def read(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_flags(parser, Options)
    return read_flags(parser.parse_args(words), Options)


def test_defaults_and_values() -> None:
    assert read() == Options()
    options = read(
        "w1", "w2", "--length", "3", "--rate", "0.5", "--budget", "5m", "--names", "p, q",
        "--name", "r", "--kind", "y", "--loud", "--note", "n",
    )  # fmt: skip
    assert options == Options(
        words=("w1", "w2"), length=3, rate=0.5, budget=300.0, names=("p", "q", "r"), kind="y",
        loud=True, note="n",
    )  # fmt: skip
    assert read("--no-loud").loud is False
    with pytest.raises(ValueError, match="negative"):
        read("--length", "-1")
    with pytest.raises(SystemExit):
        read("--kind", "z")


def test_help_is_the_docstring(capsys) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "what to read, one or more." in text
    assert "how long, 100% exact. (default: 7)" in text


def test_durations() -> None:
    assert [seconds(t) for t in ("90", "90s", "1.5m", "2h", "3 min")] == [90, 90, 90, 7200, 180]
    for wrong in ("0", "-3", "5 weeks", "", "0s"):
        with pytest.raises(ValueError, match="duration"):
            seconds(wrong)


def test_configs_are_strict() -> None:
    options = Options(words=("w",), rate=0.1)
    assert Options.from_json(options.to_json()) == options
    with pytest.raises(ValueError, match="did you mean 'length'"):
        Options.from_dict({"lenght": 3})
    assert options.replace(length=2).length == 2
    with pytest.raises(ValueError, match="no option 'size'"):
        options.replace(size=2)


def test_missing_extras_are_named() -> None:
    with pytest.raises(MissingExtraError, match=r"manyheads\[choose\]"):
        require_extra("no_such_module_here", "choose", "drawing")
    require_extra("json", "choose", "drawing")
    assert nearest("sofmax", ["softmax", "gla"]) == " (did you mean 'softmax'?)"
    assert nearest("zzz", ["softmax"]) == ""
