"""`manyheads list`: the registry as a table, one mechanism in full."""

from __future__ import annotations

import json

from manyheads import attention
from manyheads.choose.facts import facts
from manyheads.cli import main
from manyheads.registry import get_mechanism, list_mechanisms


def test_all_of_them(capsys) -> None:
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in list_mechanisms():
        assert any(line.startswith(f"{name} ") for line in shown.splitlines())
        assert get_mechanism(name).cost in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_those_that_match(capsys) -> None:
    assert main(["list", "s*"]) == 0
    shown = capsys.readouterr().out
    assert "softmax" in shown
    assert "\ngla" not in shown


def test_one_in_full(capsys) -> None:
    assert main(["list", "gla"]) == 0
    shown = capsys.readouterr().out
    assert "manyheads.attention.gla" in shown
    assert "manyheads papers gla" in shown
    assert all(note in shown for note in get_mechanism("gla").notes)


def test_none(capsys) -> None:
    assert main(["list", "sofmax"]) == 2
    assert "did you mean 'softmax'" in capsys.readouterr().err


def test_as_json(capsys) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [f["name"] for f in found] == list_mechanisms()


def test_names_exist() -> None:
    for name in list_mechanisms():
        f = facts(name)
        for dotted in (f["function"], f["module"]):
            assert hasattr(attention, dotted.rpartition(".")[2]), dotted
