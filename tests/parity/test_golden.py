"""Every golden file is run as a user would run the code with an official checkpoint."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from manyheads.native import disabled
from parity.adapters import implemented, load_adapters
from parity.golden import ADAPTERS, NOT_YET, Golden, check, golden_files

# Papers whose operators are kernels where a compiler is found: both forms are compared.
WITH_KERNELS = {"aaren", "flowformer", "gla", "landmark", "lean", "quamba", "sla", "transnormer"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden")
    files = list(golden_files(folder))
    cases = [(f, True) for f in files] + [
        (f, False) for f in files if f.parent.name in WITH_KERNELS
    ]
    names = [f"{f.parent.name}/{f.stem}" + ("" if kernels else "-pytorch") for f, kernels in cases]
    metafunc.parametrize(("path", "kernels"), cases, ids=names)


def test_golden(path: Path, kernels: bool) -> None:
    slug = path.parent.name
    if slug not in implemented():
        pytest.skip(f"{slug} is not in the library yet")
    load_adapters()
    golden = Golden.read(path)
    key = (golden.meta["system"], golden.meta["kind"])
    if key in NOT_YET:
        assert key not in ADAPTERS, f"{key[1]!r} of {key[0]!r} is in: take it off the list"
        pytest.skip(f"{key[1]} of {slug} is not in the library yet")
    assert key in ADAPTERS, f"no adapter for the kind {key[1]!r} of {key[0]!r}"
    torch.manual_seed(0)
    with nullcontext() if kernels else disabled():
        check(golden, ADAPTERS[key](golden))
