"""The pictures and the page: well-formed, self-contained, escaped, one colour a mechanism."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from manyheads.choose.answer import decide
from manyheads.choose.draw import colour, draw, marker
from manyheads.choose.html import page, write_report
from manyheads.choose.machine import machine_facts
from manyheads.choose.results import CostRow, QualityRow, Results, Summary, Unit
from manyheads.choose.workload import Workload
from manyheads.registry import list_mechanisms

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def results() -> Results:
    workload = Workload(length=1024, mixers=("gla", "norm", "gla*3,softmax"), probes=("recall",))
    made = Results(workload, machine_facts())
    made.machine["matmul_flops"] = 1e11
    for i, mixer in enumerate(workload.candidates):
        for n in (256, 512, 1024):
            seconds = 1e-3 * (i + 1) * (n / 256) ** (2 if mixer == "softmax" else 1)
            made.cost.append(
                CostRow(
                    mixer=mixer, length=n, train_seconds=seconds, train_lower=seconds * 0.9,
                    train_upper=seconds * 1.1, decode_seconds=seconds / n, peak_bytes=1000 * n,
                    state_bytes=n * 10, predicted=("train_seconds",) if n == 1024 else (),
                )
            )  # fmt: skip
        curve = tuple((s, 100 * s, 3 - 0.1 * s) for s in range(1, 9))
        made.quality.append(
            QualityRow(mixer=mixer, task="text", regime="seconds", metric="bits_per_byte",
                       value=2.2 + 0.01 * i, curve=curve)
        )  # fmt: skip
        made.quality.append(
            QualityRow(mixer=mixer, task="recall", regime="tokens", metric="accuracy",
                       value=0.9 - 0.2 * i, spread=0.02, chance=0.1, state_bytes=1000 * (i + 1))
        )  # fmt: skip
    made.summary.append(Summary(mixer="gla", crossover=300.0, crossover_kind="at", up_to=1024))
    made.units["cost/train/norm/1024"] = Unit(
        key="cost/train/norm/1024", status="predicted", reason="a <b>reason</b> & more"
    )
    made.answer = decide(made)
    return made


class Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href") and not (value or "").startswith("#"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(results) -> None:
    text = page(results, draw(results))
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.addresses
    assert len(checker.ids) == len(set(checker.ids))
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
    assert "<b>reason</b>" not in text
    assert "a &lt;b&gt;reason&lt;/b&gt; &amp; more" in text
    assert text.index("Which attention") < text.index("Pareto front") < text.index("Costs")
    assert text.count('role="img" aria-label=') == 4


def test_pictures_are_png_and_named(results, tmp_path) -> None:
    paths = write_report(results, tmp_path / "out")
    assert [p.name for p in paths] == [
        "report.html", "time.png", "memory.png", "quality.png", "probes.png"
    ]  # fmt: skip
    for path in paths[1:]:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_colours_are_fixed_and_told_apart() -> None:
    names = list_mechanisms()
    assert len({(colour(n), marker(n)) for n in names}) == len(names)
    assert colour("gla") == colour("gla", ("x",))


def test_nothing_measured_is_a_page_too() -> None:
    empty = Results(Workload(length=256), machine_facts())
    assert draw(empty) == []
    text = page(empty, [])
    assert "nothing was measured yet" in text
