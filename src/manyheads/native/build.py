"""Compile a family of kernels for this processor, once.

The library's name holds a digest of the sources, the compiler, its flags and the processor: what
any of them changes is compiled anew, and what an older version left is not loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from manyheads.errors import unknown_name

__all__ = [
    "BuildError",
    "Family",
    "build",
    "cache_folder",
    "compiler",
    "describe",
    "families",
    "library_path",
]

SOURCES = Path(__file__).resolve().parent.parent / "csrc"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno",
          "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi")  # fmt: skip
# -Og keeps the sanitizers' reports readable; recovery is off, so that a finding ends the process.
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-Og")
_LIMIT = 300  # seconds


class BuildError(RuntimeError):
    """A kernel could not be compiled; the message says what the compiler said."""


def families() -> tuple[str, ...]:
    """Return the names of the families, one for each file of ``csrc/``."""
    return tuple(sorted(path.stem for path in SOURCES.glob("*.cpp")))


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What a family is: ``serves``, what it computes; ``without``, what its absence costs."""

    serves: str
    without: str


def describe(family: str) -> Family:
    """Read a family's facts from the comment its source begins with: the first sentence, and the
    paragraph that begins with "Without it:".

    Raises:
        ValueError: no such family.
    """
    lines = []
    for line in _source(family).read_text(encoding="utf-8").splitlines():
        if not line.startswith("//"):
            break
        lines.append(line[2:].strip())
    paragraphs = [" ".join(p.split()) for p in "\n".join(lines).split("\n\n")]
    serves = paragraphs[0].split(". ")[0].rstrip(".") if paragraphs else ""
    missing = (p.partition(":")[2].strip() for p in paragraphs if p.startswith("Without it:"))
    return Family(serves=serves, without=next(missing, "PyTorch forms run, slower").rstrip("."))


@cache
def compiler() -> str | None:
    """Return the path of the C++ compiler: that of ``$CXX``, else c++, g++ or clang++; or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def cache_folder() -> Path:
    """Return the folder of compiled kernels, made if need be, that only this user can write to.

    Raises:
        BuildError: it belongs to somebody else or others can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "manyheads" / "native"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.stat()
        if hasattr(os, "getuid") and facts.st_uid != os.getuid():
            raise BuildError(f"{folder} belongs to another user: set XDG_CACHE_HOME to your own")
        if facts.st_mode & 0o022:
            folder.chmod(0o700)
    except OSError as error:
        raise BuildError(f"{folder} cannot be used ({error}): set XDG_CACHE_HOME") from error
    return folder


def library_path(family: str, *, sanitize: bool = False) -> Path:
    """Return where the compiled library of a family stands, or will stand.

    Raises:
        ValueError: no such family.
        BuildError: there is no compiler, or no cache folder.
    """
    source = _source(family)
    digest = hashlib.sha256()
    for path in (source, *sorted(SOURCES.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for fact in (*_command(sanitize), _version(_compiler()), _processor()):
        digest.update(fact.encode() + b"\0")
    return cache_folder() / f"{family}-{digest.hexdigest()[:24]}.so"


def build(family: str, *, sanitize: bool = False) -> Path:
    """Compile a family unless its library is in the cache, and return the library's path.

    Takes a few seconds. Several processes may build at once: each writes a file of its own and
    renames it, so that a library is there whole or not at all.

    Args:
        family: name of a file of ``csrc/``.
        sanitize: with address- and undefined-behaviour sanitizers, for tests.

    Raises:
        ValueError: no such family.
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    target = library_path(family, sanitize=sanitize)
    if target.exists():
        return target
    handle, name = tempfile.mkstemp(prefix=f".{family}-", suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        command = [*_command(sanitize), str(_source(family)), "-o", name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{command[0]} did not finish: {error}") from error
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[-12:])
            raise BuildError(f"{' '.join(command[:1])} could not compile {family}.cpp:\n{said}")
        os.chmod(name, 0o700)
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)
    return target


def _source(family: str) -> Path:
    if family not in families():
        raise unknown_name("kernel family", family, families())
    return SOURCES / f"{family}.cpp"


def _compiler() -> str:
    found = compiler()
    if found is None:
        raise BuildError("no C++ compiler is installed: install g++ or clang++, or set CXX")
    return found


def _command(sanitize: bool) -> list[str]:
    tune = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    return [_compiler(), *_FLAGS, tune, *(_SANITIZE if sanitize else ())]


@cache
def _version(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


@cache
def _processor() -> str:
    """Return what -march=native depends on: model and instruction sets."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(line for line in lines if line.startswith(wanted))
