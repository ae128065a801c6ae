"""Options and habits of all tests: one thread, poisoned empty tensors, fixed seeds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    shared = ROOT.parent / "shared" / "golden"
    default = shared if shared.is_dir() else ROOT / "tests" / "golden"
    parser.addoption(
        "--golden", type=Path, default=default, help="folder of golden files, one folder a paper"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # The set of constructors that torch.device() redirects is built once, at its first use:
    # it has to hold the real torch.empty, not the poisoned one.
    with torch.device("meta"):
        torch.empty(1)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty and its kin return with NaN, so that reading it shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            called_by = sys._getframe(1).f_globals.get("__name__", "")
            if called_by.startswith("manyheads") and out.is_floating_point() and not out.is_meta:
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
