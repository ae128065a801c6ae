"""Tables as text: aligned, marked, narrow enough to read."""

from __future__ import annotations

import pytest

from manyheads.choose.results import Answer, CostRow, QualityRow, Results, Summary, Unit
from manyheads.choose.table import answer_text, cost_table, length_table, text_table
from manyheads.choose.units import show_bytes, show_count, show_seconds
from manyheads.choose.workload import Workload


@pytest.fixture
def results() -> Results:
    w = Workload(length=64, lengths=(32,), mixers=("gla", "softmax"), model_layers=12)
    machine = {"cpu": "c", "threads": 1, "torch": "t", "matmul_flops": 1e9}
    r = Results(w, machine)
    for n in (32, 64):
        for mixer, seconds in (("gla", 2e-3), ("softmax", 1e-3)):
            r.cost.append(
                CostRow(
                    mixer=mixer, length=n, forward_seconds=seconds / 3, train_seconds=seconds,
                    train_lower=0.9 * seconds, train_upper=1.1 * seconds, state_bytes=1000,
                    peak_bytes=5000, flops=10**9, share=0.5,
                    predicted=("train_seconds",) if (mixer, n) == ("gla", 64) else (),
                )
            )  # fmt: skip
    r.summary = [
        Summary(mixer="gla", crossover_kind="never", up_to=64, train_exponent=1.02),
        Summary(mixer="softmax", crossover_kind="reference"),
    ]
    for regime, value in (("tokens", 2.25), ("seconds", 2.5)):
        r.quality.append(
            QualityRow(mixer="gla", task="text", regime=regime, metric="bits_per_byte", value=value)
        )
    row = QualityRow(mixer="gla", task="copy", regime="tokens", metric="accuracy", value=0.5)
    r.quality.insert(0, row)
    r.answer = Answer(best="softmax", reasons=("It is the fastest.",), loses=("gla is smaller.",))
    return r


def test_columns_are_aligned_and_the_best_is_marked() -> None:
    text = text_table(("a", "bb"), [("x", "1"), ("long", "23")], mark="long")
    assert text.splitlines() == ["  a     bb", "  ----  --", "  x      1", "> long  23"]
    assert text_table(("a",), [("x",)], mark="y").splitlines() == ["a", "-", "x"]


def test_costs_and_quality(results) -> None:
    lines = cost_table(results).splitlines()
    assert lines[2].startswith("> softmax"), "the fastest first, the recommended marked"
    assert "1.00 ms ±10%" in lines[2]
    assert "~2.00 ms" in lines[3], "a prediction has no spread"
    assert "never up to 64" in lines[3]
    assert "N^1.02" in lines[3]
    assert "1.00 kB" in lines[2]
    assert "12.0 kB" in lines[2]
    assert "x 12 layers" in lines[0]
    head = next(line for line in lines if "bits/byte" in line)
    assert head.index("equal time") < head.index("equal tokens") < head.index("copy")
    row = next(line for line in lines[5:] if line.startswith("  gla"))
    assert row.split() == ["gla", "2.500", "2.250", "50%"]
    assert max(map(len, lines)) <= 120


def test_lengths(results) -> None:
    lines = length_table(results).splitlines()
    assert lines[1].split() == ["length", "gla", "softmax"]
    assert lines[-1].split() == ["64", "~2.00", "ms", "1.00", "ms"]


def test_what_is_missing_is_said_once(results) -> None:
    units = [
        Unit(key=f"cost/train/gla/{n}", status="predicted", reason=f"takes {n} s", cause="time")
        for n in (32, 64, 128)
    ]
    results.put(
        *units,
        Unit(key="quality/copy/gla", status="failed", reason="no luck"),
        Unit(key="cost/decode/gla/64", status="predicted", reason="needs 5 GB", cause="memory"),
    )
    results.put(
        *(
            Unit(key=f"cost/train/{n}/256", status="skipped", reason="no time", cause="budget")
            for n in ("softmax", "flow")
        )
    )
    text = answer_text(results)
    assert text.startswith("Recommended: softmax\nIt is the fastest.")
    assert "- softmax, flow, forward and backward at 256 (no time)" in text
    assert "- gla is smaller." in text
    assert "- gla, forward and backward at 32 to 128 (the last: takes 128 s)" in text
    assert "- gla, one more token at 64 (needs 5 GB)" in text
    assert "- gla, quality, copy (no luck)" in text


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (show_seconds, 1.2e-8, "0.0120 µs"),
        (show_seconds, 9.996e-4, "1.00 ms"),
        (show_seconds, 0.0123456, "12.3 ms"),
        (show_seconds, 61.0, "61.0 s"),
        (show_seconds, 125.0, "2 min 05 s"),
        (show_seconds, 7260.0, "2 h 01 min"),
        (show_seconds, None, "-"),
        (show_bytes, 999, "999 B"),
        (show_bytes, 16_777_216, "16.8 MB"),
        (show_count, 1.7e10, "17.0 G"),
        (show_count, 0, "0"),
    ],
)
def test_three_figures_and_a_unit(show, value, text) -> None:
    assert show(value) == text
