"""The quality side: fair turns, figures at equal steps, resuming, the sizes of the small models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.choose.contest import model_layers
from manyheads.choose.machine import machine_facts
from manyheads.choose.probes import PROBE_CONFIGS, build_probe
from manyheads.choose.quality import measure_quality, text_contest
from manyheads.choose.race import Entrant, Figure, Race, common_point, grid_steps
from manyheads.choose.results import Results
from manyheads.choose.workload import Workload
from manyheads.data import TextSource


def quiet(share: float, text: str) -> None:
    assert 0 <= share <= 1


def results(**changes) -> Results:
    data = b"def f(x):\n    return x + 1\n" * 800
    workload = Workload(length=32, mixers=("gla", "softmax"), data="text", layers=1, **changes)
    return Results(workload, machine_facts(), TextSource("text", data, "0" * 64, "a loop"))


def linear_race(folder=None, names="ab") -> Race:
    """Fit y = 2x with one weight: quick, and its losses say where a run stands."""
    entrants = []
    for name in names:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        entrants.append(Entrant(name, model, torch.optim.AdamW(model.parameters())))

    def loss(model, step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - 2 * x.sum(1, keepdim=True)).square().mean()

    def evaluate(model):
        return Figure(float(loss(model, 10**6)), 0.1)

    return Race(entrants, loss, evaluate, tokens_a_step=8, rate=0.1, folder=folder)


def test_grid_and_common_point() -> None:
    steps = grid_steps(200)
    assert steps == sorted(set(steps))
    assert steps[:6] == [4, 6, 8, 12, 16, 24]
    race = linear_race()
    race.run(0.5, quiet)
    shared = common_point(race.entrants)
    one, two = race.entrants
    assert shared in steps or shared in (one.step, two.step)
    values = [next(p.figure.value for p in e.curve if p.step == shared) for e in race.entrants]
    assert values[0] == values[1], "the same model at the same step has the same figure"
    assert abs(one.seconds - two.seconds) < 0.2, "turns are dealt by training time"
    assert one.curve[-1].figure.value < one.curve[0].figure.value
    assert common_point([]) is None


def test_an_interrupted_race_goes_on_where_it_was(tmp_path) -> None:
    whole = linear_race()
    whole.run(0.3, quiet)
    broken = linear_race(tmp_path / "kept")

    def stop(share: float, text: str) -> None:
        if broken.entrants[0].step > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(5.0, stop)
    reached = [e.step for e in broken.entrants]
    resumed = linear_race(tmp_path / "kept")
    resumed.run(0.3, quiet)
    for before, entrant, reference in zip(reached, resumed.entrants, whole.entrants, strict=True):
        assert entrant.step > before
        known = {p.step: p.figure.value for p in reference.curve}
        shared = [p for p in entrant.curve if p.step in known and p.step in grid_steps()]
        assert shared
        for point in shared:
            assert point.figure.value == pytest.approx(known[point.step], rel=1e-4, abs=1e-6)
    resumed.clear()
    assert not (tmp_path / "kept").exists()


def test_a_model_that_fails_does_not_stop_the_others() -> None:
    race = linear_race()
    race.entrants[0].model = nn.Linear(4, 1)
    race.run(0.2, quiet)
    assert "shape" in str(race.entrants[0].failure)
    assert race.entrants[1].failure is None
    assert race.entrants[1].curve


def test_text_is_measured_and_kept() -> None:
    found = results()
    measure_quality(found, seconds=6.0, progress=quiet)
    rows = {(q.mixer, q.regime): q for q in found.quality}
    assert set(rows) == {(m, r) for m in ("gla", "softmax") for r in ("tokens", "seconds")}
    for row in rows.values():
        assert row.metric == "bits_per_byte"
        assert row.value is not None
        assert 0 < row.value < 8
        assert row.state_bytes
        assert row.curve[0][2] > row.curve[-1][2], "the loss falls on a text this easy"
    assert rows["gla", "tokens"].tokens == rows["softmax", "tokens"].tokens
    units = len(found.units)
    measure_quality(found, seconds=1.0, progress=quiet)
    assert len(found.units) == units, "what is done is not done again"


def test_one_seed_one_curve() -> None:
    curves = []
    for _ in range(2):
        contest = text_contest(results(seed=3))
        torch.manual_seed(3)
        model = contest.build("gla")
        curves.append([contest.loss(model, step).detach().item() for step in range(3)])
        curves[-1].append(contest.evaluate(model).value)
    assert curves[0] == curves[1]


@pytest.mark.parametrize("name", sorted(PROBE_CONFIGS))
def test_probes_give_losses_and_accuracies(name) -> None:
    workload = Workload(length=64, mixers=("gla", "softmax"), probes=(name,), layers=1)
    contest = build_probe(name, workload)
    for mixer in workload.candidates:
        model = contest.build(mixer).eval()
        contest.loss(model, 0).backward()
        value, spread = contest.evaluate(model)
        assert 0 <= value <= 1
        assert 0 < spread < 0.2
    assert 0 < contest.chance < 0.5


def test_layers_fit_every_pattern() -> None:
    workload = Workload(length=64, mixers=("gla*3,softmax", "gla,softmax*2"), layers=2)
    assert model_layers(workload) == 12
    assert model_layers(Workload(length=64, mixers=("gla",), layers=3)) == 3
