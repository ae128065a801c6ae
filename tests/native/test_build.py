"""Compiling and caching: what is compiled anew, what is never left behind, and doing without."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from manyheads.attention import mamba
from manyheads.cli import main
from manyheads.native import BuildError, build, cache_folder, describe, families, library, status
from manyheads.native import build as build_function
from manyheads.native import library as library_function

builder = sys.modules[build_function.__module__]
loader = sys.modules[library_function.__module__]
has_compiler = pytest.mark.skipif(builder.compiler() is None, reason="no C++ compiler is installed")

TINY = """// Doubles numbers. For tests.
//
// Without it: nothing
// is doubled.
#include "vec.h"
extern "C" void twice(float *x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] *= 2;
}
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A folder of sources with one small family, an empty cache, nothing loaded."""
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "tiny.cpp").write_text(TINY)
    shutil.copy(builder.SOURCES / "vec.h", sources)
    monkeypatch.setattr(builder, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "_reason", None)
    return sources


@has_compiler
def test_a_family_is_compiled_once_and_called(tiny) -> None:
    assert families() == ("tiny",)
    assert status() == {"tiny": "not compiled yet"}
    lib, x = library("tiny"), torch.arange(5.0)
    assert lib is not None
    lib("twice", x, 5)
    assert x.tolist() == [0, 2, 4, 6, 8]
    assert status() == {"tiny": "compiled"}
    path = build("tiny")
    before = path.stat().st_mtime_ns
    assert build("tiny") == path
    assert path.stat().st_mtime_ns == before
    assert describe("tiny").serves == "Doubles numbers"
    assert describe("tiny").without == "nothing is doubled"


@has_compiler
def test_whatever_the_result_depends_on_is_in_the_name(tiny, monkeypatch) -> None:
    names = {builder.library_path("tiny"), builder.library_path("tiny", sanitize=True)}
    (tiny / "tiny.cpp").write_text(TINY + "// changed\n")
    names.add(builder.library_path("tiny"))
    (tiny / "more.h").write_text("// a header\n")
    names.add(builder.library_path("tiny"))
    monkeypatch.setattr(builder, "_FLAGS", (*builder._FLAGS, "-DX"))
    names.add(builder.library_path("tiny"))
    monkeypatch.setattr(builder, "_processor", lambda: "another")
    names.add(builder.library_path("tiny"))
    monkeypatch.setattr(builder, "_version", lambda path: "newer")
    names.add(builder.library_path("tiny"))
    assert len(names) == 7


def test_the_cache_is_ours_alone(tiny, monkeypatch) -> None:
    folder = cache_folder()
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert cache_folder().stat().st_mode & 0o022 == 0
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(BuildError, match="belongs to another user"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny / "tiny.cpp"))
    with pytest.raises(BuildError, match="cannot be used"):
        cache_folder()


CHILD = """
import sys
from pathlib import Path
from manyheads.native import build, build as b
builder = sys.modules[b.__module__]
builder.SOURCES = Path(sys.argv[1])
print(build("tiny"))
"""


def child(sources: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(sources)],
        env=dict(os.environ, **environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def left_in_cache(tiny: Path) -> list[str]:
    return sorted(p.name for p in (tiny.parent / "cache" / "manyheads" / "native").iterdir())


@has_compiler
def test_two_processes_may_build_at_once(tiny) -> None:
    said = [p.communicate(timeout=120) for p in [child(tiny) for _ in range(3)]]
    paths = {out.strip() for out, _ in said}
    assert paths == {str(builder.library_path("tiny"))}, said
    assert left_in_cache(tiny) == [builder.library_path("tiny").name]
    assert library("tiny") is not None


def test_an_interrupted_build_leaves_nothing(tiny, tmp_path) -> None:
    slow = tmp_path / "slow"
    slow.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && { echo slow 1; exit; }\n'
        f"touch {tmp_path}/begun\nexec sleep 60\n"
    )
    slow.chmod(0o700)
    process = child(tiny, CXX=str(slow))
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert left_in_cache(tiny) == []


@has_compiler
def test_what_the_compiler_says_is_shown(tiny, caplog) -> None:
    (tiny / "tiny.cpp").write_text("int broken(\n")
    with pytest.raises(BuildError, match=r"could not compile tiny.cpp:\n.*error"):
        build("tiny")
    assert left_in_cache(tiny) == []
    with caplog.at_level(logging.WARNING, "manyheads"):
        assert library("tiny") is None
        assert library("tiny") is None
    (record,) = caplog.records
    assert "could not compile tiny.cpp" in record.getMessage()


def test_without_a_compiler_one_warning_and_the_same_results(monkeypatch, caplog) -> None:
    q, k, x = torch.randn(3, 1, 1, 40, 16)
    args = (q, k, x, x, -torch.rand(1, 16, 16))
    wanted = mamba(*args)
    monkeypatch.setattr(builder, "compiler", lambda: None)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "_reason", None)
    with caplog.at_level(logging.WARNING, "manyheads"):
        out = mamba(*args)
        mamba(*args)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    (record,) = caplog.records
    assert "no C++ compiler is installed" in record.getMessage()
    assert "manyheads doctor" in record.getMessage()
    assert all("install g++ or clang++" in state for state in status().values())
    with pytest.raises(RuntimeError, match="install g"):
        mamba(*args, implementation="native")


@has_compiler
def test_the_verbs(tiny, capsys) -> None:
    assert main(["native", "status"]) == 0
    assert "tiny       not compiled yet: Doubles numbers" in capsys.readouterr().out
    assert main(["native", "build"]) == 0
    assert "compiled in" in capsys.readouterr().out
    assert main(["native", "build", "tiny"]) == 0
    assert "was there" in capsys.readouterr().out
    assert main(["native", "status", "--json"]) == 0
    assert '"state": "compiled"' in capsys.readouterr().out
    assert main(["native", "build", "tini"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    (tiny / "tiny.cpp").write_text("int broken(\n")
    assert main(["native", "build"]) == 1
    assert "could not compile" in capsys.readouterr().err
