"""`manyheads bench`: its record, its targets and how they are judged."""

from __future__ import annotations

import json
import math
import os
import socket

import pytest
import torch

from manyheads.choose.bench import decode, grid, sequence, special
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


def test_targets_of_sla() -> None:
    made_up = {
        "length": 32_768, "forward": {"times_faster": 16.0}, "backward": {"times_faster": 5.0},
        "largest_tensor_bytes": 1, "square_bytes": 1000,
    }  # fmt: skip
    found = verdicts([], {"sla_against_softmax": made_up})
    met = {what: v["met"] for what, v in found.items() if v["met"] is not None}
    assert list(met.values()) == [True, False, True]
    short = verdicts([], {"sla_against_softmax": made_up | {"length": 512}})
    assert all(v["met"] is None for v in short.values())


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


def test_long_sequences_are_judged_at_their_own_length() -> None:
    row = {"form": "routing top", "length": 16384, "times_faster": 9.0, "exponent": 1.7}
    words = "routing, top, causal, clusters and window sqrt(N)"
    faster = f"{words}, forward and backward at 16,384: times as fast as SDPA"
    found = verdicts([], {"long_sequences": [row]})
    assert (found[faster]["measured"], found[faster]["met"]) == (9.0, True)
    assert found[f"{words}: exponent of time in length, 4k to 32k"]["met"] is False
    assert verdicts([], {"long_sequences": [row | {"length": 256}]})[faster]["met"] is None
    orchid = "orchid, 256 channels, forward and backward at 16,384: times as fast as SDPA"
    assert found[orchid]["met"] is None


def test_landmark_and_decoding_are_judged_in_a_full_run_alone() -> None:
    made_up = {
        "landmark_decode": {"cached": 65536, "times_faster": 9.0},
        "landmark_training": {"length": 4096, "ratio": 1.5},
        "model_decode": [
            {"mechanism": "gla", "batch": 4, "contexts": [1024, 8192], "times_faster": 6.0,
             "times_faster_than_lean": 1.9, "context_ratio": 1.0},
            {"mechanism": "aaren", "batch": 1, "contexts": [1024, 8192], "times_faster": 4.0,
             "times_faster_than_lean": 2.1, "context_ratio": 1.4},
        ],
    }  # fmt: skip
    found = {w: v["met"] for w, v in verdicts([], made_up).items() if v["met"] is not None}
    assert found == {
        "landmark, a token that fetches 4 blocks of 50 of 65,536: times as fast as SDPA": False,
        "landmark, forward and backward at 4,096: time over causal SDPA": True,
        "gla, a token of 12 layers behind 8,192, batch 4: times as fast as softmax with a cache":
            True,
        "aaren, a token of 12 layers behind 8,192, batch 1: times as fast as softmax with a cache":
            False,
        "gla, a token of 12 layers behind 8,192, batch 4: times as fast as softmax by lean": False,
        "aaren, a token of 12 layers behind 8,192, batch 1: times as fast as softmax by lean": True,
        "aaren, a token of 12 layers behind 8,192, batch 1: time over that behind 1,024": False,
    }  # fmt: skip
    made_up["model_decode"] = [{"mechanism": "gla", "batch": 4, "contexts": [16, 64]}]
    made_up["landmark_decode"]["cached"] = 1024
    made_up["landmark_training"]["length"] = 256
    assert not [w for w, v in verdicts([], made_up).items() if v["met"] is not None]


def test_quick_forms_of_long_sequences_and_decoding() -> None:
    rows_ = sequence.long_sequences(quick=True, seed=0)
    assert [r["form"] for r in rows_] == ["routing strict", "routing top", "orchid"]
    assert all(len(r["grown_seconds"]) == len(r["lengths"]) for r in rows_)
    rows_ = decode.model_decode(quick=True, seed=0)
    assert {(r["mechanism"], r["batch"]) for r in rows_} == {
        (n, b) for n in ("gla", "mamba", "aaren") for b in (1, 2)
    }
    for row in rows_:
        few, many, cache = (row["state_bytes"][k] for k in ("few", "many", "softmax"))
        assert few == many < cache == row["state_bytes"]["lean"]
        assert row["read_ratio"] > 1


def test_quick_form_of_quickened_decoding() -> None:
    rows_ = decode.quickened_decode(quick=True, seed=0)
    assert [r["batch"] for r in rows_] == [1, 2]
    assert all(r["times_faster"] > 0 and set(r["seconds"]) == {"plain", "quickened"} for r in rows_)


def test_a_decoding_state_is_that_of_its_context() -> None:
    model = decode._model("softmax", decode._QUICK)
    with torch.inference_mode():
        state = decode._state(model, 2, 64)
    assert state.position.tolist() == [64, 64]
    for layer in state.layers:
        assert layer.cache.length.tolist() == [64, 64]
        assert layer.cache.key.shape[2] > 64
    first, second = (s.cache.key.data_ptr() for s in state.layers)
    assert first != second


def test_the_memory_of_the_landmark_benchmark_stays_as_it_is() -> None:
    found = sequence.landmark_decode(quick=True, seed=0)
    assert found["cached"] == 1024
    assert found["times_faster"] > 0
    assert sequence.landmark_training(quick=True, seed=0)["ratio"] > 0
