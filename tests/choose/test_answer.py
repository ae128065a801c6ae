"""The rule of the recommendation, on figures made up for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from manyheads.choose.answer import decide, pareto_front
from manyheads.choose.machine import machine_facts
from manyheads.choose.results import CostRow, QualityRow, Results, Summary
from manyheads.choose.workload import Workload


def results(times, text=None, recall=None, *, spread=0.02, state=None) -> Results:
    probes = ("recall",) if recall else ()
    workload = Workload(
        length=1024, mixers=tuple(times), phases=("train", "decode"), probes=probes,
        data="builtin:python" if text else None,
    )  # fmt: skip
    made = Results(workload, machine_facts())
    for mixer, (train, decode) in times.items():
        made.cost.append(
            CostRow(
                mixer=mixer, length=1024, train_seconds=train, train_lower=train * (1 - spread),
                train_upper=train * (1 + spread), decode_seconds=decode,
                peak_bytes=1000, state_bytes=(state or {}).get(mixer, 100),
            )
        )  # fmt: skip
    for task, values, metric in (
        ("text", text, "bits_per_byte"), ("recall", recall, "accuracy")
    ):  # fmt: skip
        for mixer, value in (values or {}).items():
            regime = "seconds" if task == "text" else "tokens"
            made.quality.append(
                QualityRow(mixer=mixer, task=task, regime=regime, metric=metric, value=value)
            )
    return made


FAST = {"softmax": (1.0, 1.0), "gla": (0.2, 0.5), "norm": (0.1, 0.5)}


def test_without_quality_the_fastest_is_taken() -> None:
    answer = decide(results(FAST))
    assert answer.best == "norm"
    assert "10.0x faster than softmax in forward and backward" in answer.reasons[0]
    assert "No quality was measured" in answer.reasons[1]
    assert not answer.partial


def test_quality_comes_before_time() -> None:
    answer = decide(results(FAST, text={"softmax": 2.0, "gla": 2.05, "norm": 2.2}))
    assert answer.best == "gla"
    assert any("norm is faster but not near the best at text" in line for line in answer.loses)
    assert any("softmax is better at text" in line for line in answer.loses)


def test_softmax_is_kept_when_that_is_the_truth() -> None:
    slow = {"softmax": (1.0, 1.0), "gla": (2.0, 1.5)}
    answer = decide(results(slow))
    assert answer.best == "softmax"
    assert answer.reasons[0].startswith("Keep softmax: it is the fastest of 2")
    worse = decide(results(FAST, text={"softmax": 2.0, "gla": 2.5, "norm": 2.6}))
    assert worse.best == "softmax"
    assert "not as good" in worse.reasons[0]
    near = decide(results({"softmax": (1.0, 1.0), "gla": (0.98, 0.99)}, spread=0.05))
    assert near.best == "softmax"
    assert near.ties == ("gla",)
    assert "beyond the spread" in near.reasons[0]


def test_recall_puts_out_what_cannot_recall() -> None:
    recall = {"softmax": 0.95, "gla": 0.9, "norm": 0.3}
    answer = decide(results(FAST, text=dict.fromkeys(FAST, 2.0), recall=recall))
    assert answer.best == "gla"


def test_a_probe_that_nothing_learned_decides_nothing() -> None:
    recall = {"softmax": 0.19, "gla": 0.15, "norm": 0.02}
    answer = decide(results(FAST, text=dict.fromkeys(FAST, 2.0), recall=recall))
    assert answer.best == "norm"
    assert "near the best at text (" in answer.reasons[1]
    assert any("recall decided nothing" in line and "19%" in line for line in answer.loses)
    alone = decide(results(FAST, recall=recall))
    assert alone.best == "norm"
    assert "No candidate learned recall" in alone.reasons[1]


def test_text_that_was_judged_early_is_said() -> None:
    for steps, warned in ((6, True), (400, False)):
        made = results(FAST, text=dict.fromkeys(FAST, 2.0))
        made.quality = [q.replace(details={"steps": steps}) for q in made.quality]
        assert any("after 6 training steps" in line for line in decide(made).loses) is warned


def test_losing_cases_are_said() -> None:
    made = results({"softmax": (1.0, 0.5), "gla": (0.2, 1.0)}, state={"softmax": 50})
    made.summary.append(
        Summary(mixer="gla", crossover=700.0, crossover_kind="at", up_to=1024)
    )  # fmt: skip
    answer = decide(made)
    text = " ".join(answer.loses)
    assert "Below about 700 tokens softmax is faster than gla" in text
    assert "gla is slower than softmax in decoding a token" in text
    assert "softmax needs less state" in text


def test_nothing_measured() -> None:
    made = results(FAST)
    made.cost.clear()
    answer = decide(made)
    assert answer.best is None
    assert answer.partial
    partly = results(FAST)
    partly.cost.pop()
    assert decide(partly).partial


POINTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)),
    min_size=1,
    max_size=12,
)


@given(points=POINTS)
def test_the_front_is_what_nothing_beats(points) -> None:
    front = pareto_front(points)
    assert front
    for name, point in points.items():
        beaten = [
            other
            for other in points.values()
            if all(a <= b for a, b in zip(other, point, strict=True)) and other != point
        ]
        assert (name in front) == (not beaten)


@given(
    times=st.fixed_dictionaries(
        {n: st.tuples(st.floats(1e-5, 10), st.floats(1e-6, 1)) for n in ("softmax", "gla", "norm")}
    ),
    text=st.fixed_dictionaries({n: st.floats(1, 8) for n in ("softmax", "gla", "norm")}),
)
def test_the_answer_is_near_the_best_and_on_the_front(times, text) -> None:
    made = results(times, text=text)
    answer = decide(made)
    assert answer == decide(made)
    assert answer.best is not None
    assert text[answer.best] <= min(text.values()) * 1.03 + 1e-9
    assert len(answer.reasons) == 2
    if answer.best != "softmax" and not answer.ties:
        assert answer.best in answer.front
