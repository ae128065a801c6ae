"""Run every family of kernels under address- and undefined-behaviour sanitizers.

Run as ``python tools/sanitize.py [FAMILY...]``. Each family is compiled with
-fsanitize=address,undefined, and the calls of tests/native/calls_<family>.py are made in a process
that was started with the sanitizers' runtime: the first finding ends it. A family without a file
of calls is a failure, as is one that cannot be compiled.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LIMIT = 300  # seconds
_FINDING = re.compile(r"ERROR: AddressSanitizer|runtime error:")
_THREADS = 3  # more than one, so that slices and scratch of threads are told apart

# The child swaps the library in, so that nothing outside of it has to know of sanitizers.
CHILD = """
import importlib, sys
import torch
torch.set_num_threads({threads})
from manyheads.native import Library, build
from manyheads.native.build import library_path
loader = sys.modules[Library.__module__]
loader._loaded[{family!r}] = Library(str(build({family!r}, sanitize=True)))
calls = importlib.import_module("native.calls_{family}")
print(sum(1 for _ in calls.calls()))
"""


def runtime() -> str:
    """Return the libraries to load first: the sanitizers', then C++'s, which they intercept."""
    from manyheads.native.build import compiler

    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [compiler() or "c++", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if os.path.sep not in found:
            raise SystemExit(f"{name} is not installed: install the compiler's sanitizers (GCC)")
        paths.append(found)
    return ":".join(paths)


def check(family: str, preload: str) -> str | None:
    """Return what is wrong with a family, or None."""
    from manyheads.native import BuildError, build

    if not (ROOT / "tests" / "native" / f"calls_{family}.py").exists():
        return f"there is no tests/native/calls_{family}.py: write a few calls of its kernels"
    try:
        build(family, sanitize=True)
    except BuildError as error:
        return str(error)
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"))),
        LD_PRELOAD=preload,
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
    )
    code = CHILD.format(family=family, threads=_THREADS)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True,
            timeout=_LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"did not end within {_LIMIT} s"
    if done.returncode or not done.stdout.strip().isdecimal():
        lines = done.stderr.splitlines()
        begin = next((i for i, line in enumerate(lines) if _FINDING.search(line)), -40)
        return f"ended with {done.returncode}\n" + "\n".join(lines[begin:][:40])
    return None if int(done.stdout) else "made no call"


def main() -> int:
    """Check the named families, or all; returns 1 if something was found."""
    sys.path.insert(0, str(ROOT / "src"))
    from manyheads.native import families

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="families to run (none: all)")
    chosen = parser.parse_args().families or families()
    begin, preload = time.perf_counter(), runtime()
    with ThreadPoolExecutor(max_workers=2) as pool:
        problems = list(pool.map(lambda f: check(f, preload), chosen))
    for family, problem in zip(chosen, problems, strict=True):
        print(f"{'clean' if problem is None else 'FOUND'}  {family}")
        if problem is not None:
            print(problem)
    print(f"{len(chosen)} families under sanitizers in {time.perf_counter() - begin:.0f} s")
    return int(any(p is not None for p in problems))


if __name__ == "__main__":
    sys.exit(main())
