"""results.json: written whole or not at all, taken up again, no place and no person in it."""

from __future__ import annotations

import getpass
import json
import os
import socket
from pathlib import Path

import pytest

from manyheads.choose.machine import machine_facts
from manyheads.choose.report import Report
from manyheads.choose.results import Answer, CostRow, QualityRow, Results, Summary, Unit
from manyheads.choose.workload import Workload

WORKLOAD = Workload(length=64, heads=2, head_dim=8, mixers=("gla", "gla*1,softmax*1"))


def results(workload: Workload = WORKLOAD) -> Results:
    return Results(workload, machine_facts())


def filled(folder: Path | None = None) -> Results:
    r = results()
    if folder is not None:
        r.keep_in(folder)
    r.begin()
    r.put(
        Unit(key="cost/train/gla/64", status="measured", figures={"median": 1e-3}, seconds=2.0),
        Unit(key="cost/train/softmax/64", status="predicted", reason="too slow", cause="time"),
    )
    r.cost = [CostRow(mixer="gla", length=64, train_seconds=1e-3, predicted=("peak_bytes",))]
    r.summary = [Summary(mixer="gla", crossover_kind="never", up_to=64)]
    r.put_quality(
        QualityRow(
            mixer="gla", task="text", regime="tokens", metric="bits_per_byte", value=2.5,
            curve=((1.0, 100, 4.0), (2.0, 200, 2.5)),
        )
    )  # fmt: skip
    r.answer = Answer(best="gla", reasons=("It is fast.",), scores={"gla": {"x": 1.0}})
    r.end("complete")
    return r


def test_there_and_back() -> None:
    r = filled()
    again = Results.from_dict(json.loads(r.to_json()))
    assert again.to_json() == r.to_json()
    assert again.quality[0].curve == ((1.0, 100, 4.0), (2.0, 200, 2.5))
    assert again.answer == r.answer
    assert again.spent("cost/") == 2.0
    assert [u.key for u in again.skipped] == ["cost/train/softmax/64"]


def test_numbers_that_are_not_finite_are_none() -> None:
    r = results()
    r.put(Unit(key="a", status="measured", figures={"x": float("nan"), "y": [float("inf"), 1.0]}))
    figures = json.loads(r.to_json())["units"][0]["figures"]
    assert figures == {"x": None, "y": [None, 1.0]}


def test_every_unit_is_on_disk_at_once(tmp_path) -> None:
    r = results()
    r.keep_in(tmp_path)
    for n in range(3):
        r.put(Unit(key=f"cost/forward/gla/{n}", status="measured"))
        assert len(Results.load(tmp_path).units) == n + 1
    assert not list(tmp_path.glob("*.part"))


def test_a_broken_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    r = filled(tmp_path)
    before = (tmp_path / "results.json").read_text()

    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        r.put(Unit(key="new", status="measured"))
    assert (tmp_path / "results.json").read_text() == before


def test_the_same_workload_resumes(tmp_path) -> None:
    filled(tmp_path)
    again = results()
    assert again.keep_in(tmp_path)
    assert again.has("cost/train/gla/64")
    assert again.complete
    assert len(again.sessions) == 1


def test_fresh_starts_anew(tmp_path) -> None:
    filled(tmp_path)
    again = results()
    assert not again.keep_in(tmp_path, fresh=True)
    assert not Results.load(tmp_path).units


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"length": 65}, {"budget": 10.0}, {"mixers": ("gla",)}]
)
def test_another_workload_does_not_resume_and_loses_nothing(tmp_path, change) -> None:
    first = filled(tmp_path)
    other = results(WORKLOAD.replace(**change))
    assert other.key != first.key
    assert not other.keep_in(tmp_path)
    assert Results.load(tmp_path).key == other.key
    back = results()
    assert back.keep_in(tmp_path)
    assert back.has("cost/train/gla/64")
    assert (tmp_path / f"results-{other.key}.json").is_file()


def test_a_file_that_is_no_results_is_not_read(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        Results.load(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        Results.load(tmp_path)
    (tmp_path / "results.json").write_text('{"kind": "manyheads.choose", "schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        Results.load(tmp_path)
    assert not results().keep_in(tmp_path)


def test_no_host_no_user_no_path(tmp_path) -> None:
    text = tmp_path / "secret-folder" / "notes.txt"
    text.parent.mkdir()
    text.write_text("word " * 4000)
    workload = Workload(data=str(text))
    r = Results(workload, machine_facts(), workload.load_data())
    r.keep_in(tmp_path / "out")
    written = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(written)["data"]["name"] == "notes.txt"
    words = ["secret-folder", str(tmp_path), os.getcwd(), str(Path.home()) + "/"]
    words += [socket.gethostname()] if len(socket.gethostname()) > 3 else []
    words += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    for word in words:
        assert word not in written


def test_where_the_text_lies_does_not_matter_what_it_says_does(tmp_path) -> None:
    keys = []
    for name, content in (("a.txt", "x" * 999), ("b.txt", "x" * 999), ("c.txt", "y" * 999)):
        (tmp_path / name).write_text(content)
        w = Workload(data=str(tmp_path / name))
        keys.append(Results(w, machine_facts(), w.load_data()).key)
    assert keys[0] == keys[1] != keys[2]


def test_a_quality_row_replaces_its_like() -> None:
    r = filled()
    row = r.quality[0].replace(value=1.0)
    r.put_quality(row, row.replace(regime="seconds"))
    assert [(q.regime, q.value) for q in r.quality] == [("tokens", 1.0), ("seconds", 1.0)]


def test_report_as_a_table() -> None:
    report = Report(filled())
    assert report.best == "gla"
    rows = {row["mixer"]: row for row in report.table}
    assert list(rows) == ["gla", "gla*1,softmax*1", "softmax"]
    assert rows["gla"]["text_tokens"] == 2.5
    assert rows["gla"]["crossover_kind"] == "never"
    assert rows["softmax"]["train_seconds"] is None
    assert json.dumps(report.table)
    assert "gla" in str(report)
