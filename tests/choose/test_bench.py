"""`manyheads bench`: its record, its targets and how they are judged."""

from __future__ import annotations

import json
import math
import os
import socket

import pytest

from manyheads.choose.bench import grid, special
from manyheads.choose.bench import lean as lean_bench
from manyheads.choose.bench.grid import SDPA, is_linear, summarise
from manyheads.choose.bench.targets import TARGETS, judge
from manyheads.choose.bench.text import bench_text
from manyheads.cli import main
from manyheads.registry import get_mechanism, list_mechanisms


def test_quick_runs_everything(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(grid, "_QUICK_LENGTHS", (64, 96))
    # It would hold for the rest of the tests.
    monkeypatch.setattr(special, "keep_freed_memory", lambda: True)
    out = tmp_path / "folder" / "bench.json"
    assert main(["bench", "--quick", "--threads", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["schema"] == 1
    assert record["quick"]
    assert record["machine"]["threads"] == 1
    assert {r["length"] for r in record["rows"]} == {64, 96}
    for row in record["rows"]:
        assert len(row["samples"]) >= 3
        assert row["times_faster_than_sdpa"] > 0
    names = set(list_mechanisms()) - {"softmax"}
    assert {r["mechanism"] for r in record["rows"]} == names | {SDPA}
    for name in names:
        directions = {r["direction"] for r in record["rows"] if r["mechanism"] == name}
        mechanism = get_mechanism(name)
        expected = {"causal"} if mechanism.causal else set()
        assert directions == expected | ({"bidirectional"} if mechanism.bidirectional else set())
    assert len(record["targets"]) == len(TARGETS)
    assert all(t["met"] is None for t in record["targets"] if "8,192" in t["what"])
    assert "judged in a full run" in shown
    text = out.read_text()
    assert os.getcwd() not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert "written: " in shown


def test_memory_kept_is_judged_by_its_own_figures() -> None:
    rows_ = [{"mechanism": "norm", "direction": "causal", "seconds": [1.0], "exponent": 0.9}]
    made_up = {"memory_kept": {"kept": True, "lengths": [2048, 32768], "rows": rows_}}
    found = verdicts([], made_up)["norm, causal: the same where the process keeps freed memory"]
    assert (found["measured"], found["met"]) == (0.9, True)
    made_up["memory_kept"]["lengths"] = [256, 512]
    found = verdicts([], made_up)["norm, causal: the same where the process keeps freed memory"]
    assert found["met"] is None


def test_an_unwritable_file(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    assert main(["bench", "--out", str(tmp_path / "file" / "b.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_linear_is_what_the_closed_form_says() -> None:
    assert is_linear("gla")
    assert not is_linear("softmax")


def rows(name: str, seconds: dict[int, float], direction: str = "causal") -> list[dict]:
    return [
        {"mechanism": name, "direction": direction, "what": "train", "length": n, "median": t}
        for n, t in seconds.items()
    ]


def test_summary_of_made_up_times() -> None:
    lengths = (512, 1024, 2048, 4096, 8192)
    quadratic = rows(SDPA, {n: n**2 * 1e-8 for n in lengths})
    linear = rows("gla", {n: n * 1e-5 for n in (*lengths, 16384, 32768)})
    found = {s["mechanism"]: s for s in summarise(quadratic + linear)}
    assert found["gla"]["exponent"] == pytest.approx(1.0)
    assert found[SDPA]["exponent"] == pytest.approx(2.0)
    assert found["gla"]["crossover"] == pytest.approx(1000)
    assert not found["gla"]["faster_everywhere"]
    assert found["gla"]["times_faster"]["8192"] == pytest.approx(8.192)
    assert found["gla"]["exponent_lengths"] == [2048, 4096, 8192, 16384, 32768]


def verdicts(summary: list[dict], special: dict | None = None) -> dict[str, dict]:
    return {t["what"]: t for t in judge(summary, {"streaming": [], **(special or {})})}


def test_targets_met_missed_and_never() -> None:
    lengths = (512, 2048, 8192)
    base = rows(SDPA, {n: n**2 * 1e-8 for n in lengths})
    fast = verdicts(summarise(base + rows("gla", {n: n * 1e-6 for n in lengths})))
    slow = verdicts(summarise(base + rows("gla", {n: n**2 * 2e-8 for n in lengths})))
    ratio = "gla, causal, forward and backward at 8,192: times as fast as SDPA"
    cross = "gla, causal: faster than SDPA, forward and backward, from length"
    exponent = "gla, causal: exponent of time in length, 2k to 32k"
    assert [fast[w]["met"] for w in (ratio, cross, exponent)] == [True, True, True]
    assert [slow[w]["met"] for w in (ratio, cross, exponent)] == [False, False, False]
    assert slow[cross]["measured"] is None
    assert slow[ratio]["measured"] == pytest.approx(0.5)
    assert verdicts([])[ratio]["met"] is None
    assert all(v["measured"] is None or math.isfinite(v["measured"]) for v in slow.values())


def test_targets_of_the_special_measurements() -> None:
    made_up = {
        "gla_against_reference": {"length": 2048, "train": {"times_faster": 19.0}},
        "streaming": [
            {"mechanism": "aaren", "tokens": [10, 10_000], "state_bytes": [64, 64],
             "time_ratio": 1.02}
        ],
        "urpe_against_bias": [{"length": 1024, "ratio": 1.5}, {"length": 2048, "ratio": 2.5}],
        "urpe_inference_memory": {
            "length": 8192,
            "bidirectional": {"peak_bytes": 1, "square_bytes": 100},
        },
    }  # fmt: skip
    found = {
        w.split(",")[0].split(":")[0]: v
        for w, v in verdicts([], made_up).items()
        if v["met"] is not None
    }
    assert found["gla"]["met"] is False
    assert found["aaren"]["met"] is True
    assert found["urpe"]["measured"] == 2.5
    assert found["urpe"]["met"] is False
    assert found["urpe at 8"]["met"] is True


def test_targets_of_lean() -> None:
    made_up = {
        "lengths": [4096, 262_144], "over_sdpa": 6.5, "over_stacked": 0.9,
        "least_bandwidth_share": 0.71,
    }  # fmt: skip
    found = verdicts([], {"lean_against_sdpa": made_up})
    met = [v["met"] for what, v in found.items() if what.startswith("lean,")]
    assert met == [True, False, True, None]
    short = verdicts([], {"lean_against_sdpa": made_up | {"lengths": [512, 1024]}})
    assert all(v["met"] is None for v in short.values())


def test_text_of_lean(monkeypatch) -> None:
    monkeypatch.setattr(lean_bench, "_QUICK", (64,))
    found = lean_bench.lean_against_sdpa(quick=True, seed=0)
    assert {(r["heads"], r["kv_heads"], r["ragged"]) for r in found["rows"]} == {
        (8, 1, False), (8, 1, True), (32, 8, False), (32, 8, True),
    }  # fmt: skip
    assert "threads_over_one" not in found
    text = lean_bench.lean_text(found)
    assert "64 ragged, 32 on 8" in text
    assert f"{found['over_stacked']:.1f}x over" in text


def test_streaming_holds_for_every_mechanism_that_streams() -> None:
    found = special._streaming(quick=True, seed=0)
    assert {r["mechanism"] for r in found} == {
        n for n in list_mechanisms() if get_mechanism(n).step is not None
    }
    for row in found:
        first, last = row["state_bytes"]
        assert (first == last) if row["constant_state"] else (last > 50 * first)


def test_text_says_never_and_not_measured() -> None:
    lengths = (512, 2048, 8192)
    base = rows(SDPA, {n: n**2 * 1e-8 for n in lengths})
    summary = summarise(base + rows("gla", {n: n**2 * 2e-8 for n in lengths}))
    record = {
        "machine": {"cpu": "c", "threads": 1, "torch": "t", "matmul_flops": 1e9},
        "command": "manyheads bench",
        "wall_seconds": 1.0,
        "quick": False,
        "rows": [
            r | {"times_faster_than_sdpa": 0.5}
            for r in base + rows("gla", {n: n**2 * 2e-8 for n in lengths})
        ],
        "summary": summary,
        "special": {"streaming": special._streaming(quick=True, seed=0)},
        "targets": judge(summary, {"streaming": []}),
    }
    text = bench_text(record)
    for target in TARGETS:
        assert target.what in text
    assert "never" in text
    assert "MISSED" in text
    assert "not measured" in text
