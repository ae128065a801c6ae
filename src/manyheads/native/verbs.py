"""The verbs ``native build`` and ``native status``: kernels compiled ahead, and what is there."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field

from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["BuildOptions", "StatusOptions", "build", "status"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions(Config):
    """Options of `manyheads native build`.

    Attributes:
        families: families of kernels to compile (default: all)
        sanitize: with address- and undefined-behaviour sanitizers, for tests: slow, and only
            loaded into a process that was started with the sanitizers' runtime
    """

    families: tuple[str, ...] = field(default=(), metadata={"positional": True})
    sanitize: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusOptions(Config):
    """Options of `manyheads native status`.

    Attributes:
        json: print JSON
    """

    json: bool = False


def build(options: BuildOptions) -> int:
    """Compile what is not in the cache yet; 0, or 1 if a family cannot be compiled.

    Raises:
        ValueError: no such family.
    """
    from manyheads.native.build import BuildError, families, library_path
    from manyheads.native.build import build as compile_family

    for name in options.families:
        if name not in families():
            raise unknown_name("kernel family", name, families())
    failed = 0
    for name in options.families or families():
        begin = time.perf_counter()
        try:
            there = library_path(name, sanitize=options.sanitize).exists()
            path = compile_family(name, sanitize=options.sanitize)
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        how = "was there" if there else f"compiled in {time.perf_counter() - begin:.1f} s"
        print(f"{name:10} {how:18} {path}", flush=True)
    return failed


def status(options: StatusOptions) -> int:
    """Say for each family what it serves and whether its kernels are compiled. Always 0."""
    from manyheads.native.build import compiler, describe
    from manyheads.native.library import status as states

    found = {
        name: {"state": state, "serves": describe(name).serves, "without": describe(name).without}
        for name, state in states().items()
    }
    if options.json:
        print(json.dumps({"compiler": compiler(), "families": found}, indent=2))
        return 0
    print(f"compiler   {compiler() or 'none: install g++ or clang++, or set CXX'}")
    for name, facts in found.items():
        print(f"{name:10} {facts['state']}: {facts['serves']}")
        if facts["state"] != "compiled":
            print(f"{'':10} without it: {facts['without']}")
    return 0
