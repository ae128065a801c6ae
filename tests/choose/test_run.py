"""`choose` as a library: rows, predictions in place of what is too much, hybrids, resuming."""

from __future__ import annotations

import json

import pytest
import torch

import manyheads
from manyheads.choose import measure as measure_module
from manyheads.choose import run as run_module
from manyheads.choose.measure import measure_cost
from manyheads.choose.report import Report
from manyheads.choose.results import Results
from manyheads.choose.run import check_folder, choose, default_threads, prepare
from manyheads.choose.workload import Workload
from manyheads.registry import list_mechanisms

TINY = Workload(
    length=64, lengths=(16, 32), heads=2, head_dim=8, mixers=("gla", "gla*3,softmax"), budget=8.0
)


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "matmul_rate", lambda *a, **k: 1e10)
    monkeypatch.setattr(measure_module, "matmul_rate", lambda *a, **k: 1e10)


def costs(workload: Workload, seconds: float = 8.0) -> Results:
    results = prepare(workload)
    results.machine["matmul_flops"] = 1e10
    measure_cost(results, seconds=seconds)
    return results


def test_the_package_is_the_function() -> None:
    shares: list[float] = []
    report = manyheads.choose(TINY, progress=lambda share, text: shares.append(share))
    assert isinstance(report, manyheads.choose.Report)
    assert report.best in TINY.candidates
    assert [row["mixer"] for row in report.table] == ["gla", "gla*3,softmax", "softmax"]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    for mixer in TINY.candidates:
        assert mixer in str(report)


def test_rows_have_every_figure() -> None:
    results = costs(TINY)
    assert not results.skipped
    assert [(r.mixer, r.length) for r in results.cost] == [
        (m, n) for m in TINY.candidates for n in (16, 32, 64)
    ]
    for row in results.cost:
        assert not row.predicted
        for field in ("forward", "train", "decode"):
            lower, middle, upper = (
                getattr(row, f"{field}_{k}") for k in ("lower", "seconds", "upper")
            )
            assert 0 < lower <= middle <= upper
        assert min(row.peak_bytes, row.state_bytes, row.flops) > 0
        assert row.share == pytest.approx(row.flops / row.forward_seconds / 1e10, rel=0.3)
    softmax = [s for s in results.summary if s.mixer == "softmax"]
    assert softmax[0].crossover_kind == "reference"
    assert all(s.train_exponent is not None for s in results.summary)


def test_a_hybrid_is_the_average_of_its_layers() -> None:
    results = costs(TINY)
    rows = {r.mixer: r for r in results.cost if r.length == 64}
    gla, softmax, hybrid = rows["gla"], rows["softmax"], rows["gla*3,softmax"]
    for field in ("forward_seconds", "train_seconds", "decode_seconds", "state_bytes", "flops"):
        mean = (3 * getattr(gla, field) + getattr(softmax, field)) / 4
        assert getattr(hybrid, field) == pytest.approx(mean, rel=0.01)
    assert hybrid.peak_bytes == max(gla.peak_bytes, softmax.peak_bytes)


def test_bidirectional_workloads_have_no_state() -> None:
    results = costs(TINY.replace(causal=False, mixers=()))
    assert {r.mixer for r in results.cost} == set(results.workload.candidates)
    assert all(r.decode_seconds is None and r.state_bytes is None for r in results.cost)
    assert all(r.train_seconds for r in results.cost)


def test_prefill_alone_runs_no_backward() -> None:
    results = costs(TINY.replace(phases=("prefill",)))
    assert all(r.train_seconds is None and r.forward_seconds for r in results.cost)
    assert {s.crossover_in for s in results.summary} == {"forward"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype) -> None:
    results = costs(TINY.replace(dtype=dtype, lengths=(), length=32))
    assert not results.skipped


def test_grouped_heads() -> None:
    results = costs(TINY.replace(kv_heads=1, mixers=("softmax",)))
    assert results.cost_row("softmax").state_bytes == pytest.approx(64 * 2 * 8 * 4, rel=0.02)


def test_without_memory_everything_is_predicted_and_says_why(monkeypatch) -> None:
    monkeypatch.setattr(measure_module, "available_memory", lambda: 3000)
    results = costs(TINY)
    assert results.skipped
    assert all(u.cause == "memory" and "are free" in u.reason for u in results.skipped)
    row = results.cost_row("gla", 64)
    assert {"forward_seconds", "train_seconds", "peak_bytes"} <= set(row.predicted)
    assert row.train_seconds > 0
    assert row.reasons
    assert row.share is None


def test_what_does_not_fit_together_is_measured_in_turn(monkeypatch) -> None:
    """A memory that holds one subject: the first is released before the second is built."""
    stages: list[measure_module._Stage] = []
    need = measure_module._Stage._need

    def noted(stage, what, name, length):
        stages[:] = [stage]
        return need(stage, what, name, length)

    monkeypatch.setattr(measure_module._Stage, "_need", noted)
    monkeypatch.setattr(measure_module, "can_hold", lambda *_: not stages[0]._subjects)
    results = costs(TINY.replace(lengths=(), length=16))
    assert not results.skipped
    assert len(results.units) == 4 * 2


def test_without_time_everything_is_predicted_and_says_why() -> None:
    results = costs(TINY, seconds=1e-6)
    assert not results.measured()
    assert {u.cause for u in results.skipped} == {"time"}
    assert all("--budget" in u.reason for u in results.skipped)
    assert all(r.train_seconds > 0 for r in results.cost)
    assert "Not measured" in str(Report(results))


def test_a_little_time_goes_to_what_is_cheap(monkeypatch) -> None:
    """The dearest unit is left out, the rest measured."""
    dear = ("train", "softmax", 64)

    def seconds(stage, what, name, length):
        return 100.0 if (what, name, length) == dear else 1e-3

    monkeypatch.setattr(measure_module._Stage, "_least_seconds", seconds)
    results = costs(TINY)
    assert [u.key for u in results.skipped] == ["cost/train/softmax/64"]
    row = results.cost_row("softmax")
    assert row.predicted == ("train_seconds",)
    assert 0.2 < row.train_seconds / results.cost_row("softmax", 32).train_seconds < 8


def test_a_mechanism_that_breaks_does_not_break_the_run(monkeypatch) -> None:
    step = measure_module.Subject.call

    def call(subject, what):
        if subject.mechanism.name == "gla" and what == "train":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nstack")
        return step(subject, what)

    monkeypatch.setattr(measure_module.Subject, "call", call)
    results = costs(TINY)
    failed = [u for u in results.skipped if u.status == "failed"]
    assert {u.key.split("/")[2] for u in failed} == {"gla"}
    assert {(u.reason, u.cause) for u in failed} == {
        ("the system refused the memory for it", "memory")
    }
    assert results.cost_row("softmax").predicted == ()


def test_a_call_that_breaks_while_it_is_timed(monkeypatch) -> None:
    made = measure_module.Subject.call

    def call(subject, what):
        inner, count = made(subject, what), [0]

        def breaks() -> None:
            count[0] += 1
            if subject.mechanism.name == "gla" and what == "forward" and count[0] > 2:
                raise ValueError("no luck")
            inner()

        return breaks

    monkeypatch.setattr(measure_module.Subject, "call", call)
    results = costs(TINY)
    assert {u.key for u in results.skipped} == {f"cost/forward/gla/{n}" for n in (16, 32, 64)}
    assert all(u.reason == "ValueError: no luck" for u in results.skipped)


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch) -> None:
    seen: list[str] = []

    def stop(share: float, text: str) -> None:
        seen.append(text)
        if text.startswith("forward and backward at 32"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(TINY, out=tmp_path, progress=stop)
    kept = Results.load(tmp_path)
    assert kept.sessions[-1]["end"] == "interrupted"
    assert not kept.complete
    assert kept.has("cost/train/gla/16")
    assert not kept.has("cost/train/gla/64")
    assert kept.answer is not None
    assert kept.cost_row("gla", 16).predicted == ()
    report = choose(TINY, out=tmp_path)
    assert report.results.complete
    assert len(report.results.sessions) == 2
    for key, unit in kept.units.items():
        assert report.results.units[key] == unit
    assert not report.results.skipped
    again = choose(TINY, out=tmp_path).results
    assert again.units == report.results.units
    assert again.answer == report.results.answer
    assert len(again.sessions) == 2


def test_shapes_that_a_mechanism_does_not_take(monkeypatch) -> None:
    """Left out with a note if nobody asked for it, else an error."""

    def refusal(workload, name):
        return "it takes no odd head_dim" if name == "gla" else None

    monkeypatch.setattr(run_module, "_refusal", refusal)
    results = prepare(TINY.replace(mixers=()))
    assert "gla" not in results.workload.candidates
    assert "gla is left out: it takes no odd head_dim" in results.notes
    with pytest.raises(ValueError, match="gla: it takes no odd head_dim; drop it"):
        prepare(TINY)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, None, 7), (4, 2, 16), (1, None, 1)]
)
def test_everything_registered_takes_odd_shapes_or_is_left_out(heads, kv_heads, head_dim) -> None:
    workload = TINY.replace(mixers=(), heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    results = prepare(workload)
    left_out = {note.split()[0] for note in results.notes}
    names = {n for n in list_mechanisms() if n in workload.candidates}
    assert set(results.workload.candidates) == names - left_out
    assert "softmax" not in left_out


def test_a_length_that_no_memory_holds() -> None:
    with pytest.raises(ValueError, match=r"length 10+ needs at least .*B of memory") as caught:
        prepare(TINY.replace(length=10**11))
    text = str(caught.value)
    assert "are available: the largest length that fits is" in text
    most = int(text.rsplit(" ", 1)[1])
    assert 10_000 < most < 10**11
    prepare(TINY.replace(length=most, lengths=()))


def test_decoding_alone_needs_no_sequence_in_memory() -> None:
    results = prepare(TINY.replace(length=10**9, lengths=(), phases=("decode",), mixers=("gla",)))
    assert results.workload.length == 10**9


def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_folder(folder)
    assert check_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_threads_are_those_of_the_workload_and_put_back(monkeypatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        run_module, "measure", lambda *_, **__: seen.append(torch.get_num_threads())
    )
    before = torch.get_num_threads()
    report = choose(TINY.replace(threads=before + 1))
    assert seen == [before + 1]
    assert report.results.machine["threads"] == before + 1
    assert torch.get_num_threads() == before
    assert 1 <= default_threads() <= before


def test_saved_and_loaded(tmp_path) -> None:
    report = choose(TINY.replace(lengths=(), length=32))
    paths = report.save(tmp_path)
    assert tmp_path / "results.json" in paths
    assert all(p.is_file() and p.stat().st_size for p in paths)
    again = Report.load(tmp_path)
    assert again.table == report.table
    assert again.best == report.best
    assert json.loads((tmp_path / "results.json").read_text())["schema"] == 1
