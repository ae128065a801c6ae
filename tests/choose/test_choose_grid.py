"""`choose` on maps: token mixers beside sequence mechanisms, their costs and their accuracy."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.attention.grid import GridShape, get_mixer, list_mixers, register_mixer
from manyheads.attention.grid import registry as grid_registry
from manyheads.choose import measure as measure_module
from manyheads.choose import run as run_module
from manyheads.choose.cost import Subject
from manyheads.choose.from_options import read_grid, workload_from_options
from manyheads.choose.grid import GridSubject, ladder_of, map_of
from manyheads.choose.image_contest import image_contest, small_metaformer
from manyheads.choose.options import ChooseOptions
from manyheads.choose.run import choose, prepare
from manyheads.choose.workload import Workload
from manyheads.cli import main
from manyheads.registry import get_mechanism, list_mechanisms

TINY = Workload(grid=(9, 7), heads=3, head_dim=8, mixers=("pool", "flow"), budget=6.0)


@pytest.fixture(autouse=True)
def _known_rate(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "matmul_rate", lambda *a, **k: 1e10)
    monkeypatch.setattr(measure_module, "matmul_rate", lambda *a, **k: 1e10)


def test_a_grid_is_a_length_and_no_direction() -> None:
    w = Workload(grid=(56, 31), heads=3, head_dim=32)
    assert (w.length, w.causal, w.dim, w.does) == (56 * 31, False, 96, ("train",))
    assert [w.where(n) for n in w.ladder] == ["14 x 7", "28 x 15", "56 x 31"]
    assert w.candidates == w.mechanisms == tuple(list_mixers())
    sequence = [n for n in list_mechanisms() if get_mechanism(n).bidirectional]
    assert {"pool", "attention", *sequence} <= set(w.mechanisms)
    assert Workload.from_dict(w.to_dict()) == w
    assert ladder_of((5, 3)) == ((5, 3),)
    assert map_of((40, 20), 200) == (20, 10)
    assert map_of((40, 20), 50) == (10, 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": (0, 5)}, r"grid 0x5: rows 0 must be at least 1"),
        ({"grid": (5, 5, 5)}, r"must be rows and columns"),
        ({"grid": (5, 5), "lengths": (8,)}, "lengths are of sequences"),
        ({"grid": (5, 5), "kv_heads": 1}, "kv_heads are of sequences"),
        ({"grid": (5, 5), "phases": ("decode",)}, "drop it, or drop --grid"),
        ({"grid": (5, 5), "probes": ("copy",)}, "probes train causal"),
        ({"grid": (5, 5), "mixers": ("pol",)}, "did you mean 'pool'"),
        ({"grid": (5, 5), "mixers": ("gla",)}, "unknown token mixer 'gla'"),
    ],
)
def test_wrong_values_are_named(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**values)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "56"], "grid '56' is no map: write rows x columns, such as 56x56"),
        (["--grid", "0x5"], "grid '0x5' has 0 rows"),
        (["--grid", "5x0"], "grid '5x0' has 0 columns"),
        (["--grid", "5x-3"], "is no map"),
        (["--grid", "5x5", "--dim", "0"], "dim 0 must be at least 1"),
        (["--grid", "5x5", "--dim", "12", "--heads", "5"], "does not divide dim 12"),
        (["--grid", "5x5", "--length", "64"], "--length is of sequences"),
        (["--grid", "5x5", "--head-dim", "64"], "--head-dim is of sequences"),
        (["--dim", "64"], "dim 64 is of maps: give --grid too"),
        (["--grid", "5x5", "--mixers", "glaa"], "unknown token mixer 'glaa'"),
        (["--grid", "5x5", "--data", "builtin:digit"], "builtin:digits"),
        (["--grid", "99999x99999"], "the largest map that fits is"),
    ],
)
def test_wrong_flags_are_one_line_before_any_work(flags, message, tmp_path, capsys) -> None:
    assert main(["choose", *flags, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags() -> None:
    assert read_grid(" 56 x 31") == read_grid("56×31") == (56, 31)
    w = workload_from_options(ChooseOptions(grid="12x10"))
    assert (w.grid, w.heads, w.head_dim) == ((12, 10), 3, 32)
    assert workload_from_options(ChooseOptions(grid="8x8", dim=100)).heads == 2
    assert workload_from_options(ChooseOptions(grid="8x8", dim=20)).heads == 1


def test_every_mixer_is_measured() -> None:
    w = Workload(grid=(14, 10), heads=2, head_dim=10)
    sizes = GridShape(dim=20, height=14, width=10, num_heads=2)
    for name in w.mechanisms:
        subject = Subject(GridSubject(name, (14, 10)), w.shape())
        assert subject.inputs["x"].shape == (1, 20, 14, 10)
        assert subject.call("forward")().shape == (1, 20, 14, 10)
        subject.call("train")()
        assert subject.mechanism.flops(w.shape()) == get_mixer(name).flops(sizes), name


def test_the_weights_come_from_the_seed_and_gradients_reach_them() -> None:
    w, subject = TINY, GridSubject("attention", (9, 7))
    first, again = (subject.build(w.shape(), training=True, seed=3) for _ in range(2))
    other = subject.build(w.shape(), training=True, seed=4)
    assert torch.equal(first.qkv.weight, again.qkv.weight)
    assert not torch.equal(first.qkv.weight, other.qkv.weight)
    peak = Subject(subject, w.shape()).peak("train")["peak_bytes"]
    # The gradients of the weights are alive at the end: 4 C² + C numbers.
    assert peak >= 4 * (4 * w.dim**2 + w.dim)


def test_rows_and_answer() -> None:
    report = choose(TINY)
    assert [row["mixer"] for row in report.table] == ["pool", "flow", "softmax"]
    rows = report.results.cost
    assert [r.length for r in rows if r.mixer == "pool"] == [63]
    assert all(r.train_seconds and r.forward_seconds and not r.predicted for r in rows)
    assert all(r.state_bytes is None and r.decode_seconds is None for r in rows)
    text = str(report)
    assert "map 9 x 7, 24 channels (3 heads)" in text
    assert "one mixer with its projections on 9 x 7" in text
    assert report.best in TINY.candidates


def test_what_cannot_take_the_map_is_listed_with_the_reason(monkeypatch) -> None:
    monkeypatch.setattr(grid_registry, "_REGISTRY", dict(grid_registry._REGISTRY))

    def refuse(dim, *, num_heads, grid, **options):
        raise ValueError(f"dim {dim} is no good: take another")

    register_mixer(
        grid_registry.Mixer(
            name="picky", summary="refuses", paper=None, build=refuse, any_size=True, cost="O(1)",
            flops=lambda s: 0,
        )
    )  # fmt: skip
    results = prepare(TINY.replace(mixers=()))
    assert "picky" not in results.workload.mechanisms
    assert "picky is left out: dim 24 is no good: take another" in results.notes
    with pytest.raises(ValueError, match="picky: dim 24 is no good"):
        prepare(TINY.replace(mixers=("picky",)))


def test_a_matrix_of_all_places_that_no_memory_holds_is_predicted() -> None:
    """512 x 512 places: the matrix alone has 275 GB."""
    w = Workload(grid=(512, 512), heads=1, head_dim=1, mixers=("spatial_fc",))
    need = measure_module.need_bytes("train", w.subject("spatial_fc"), w.shape(), None)
    assert need > 4 * 512**4


@pytest.fixture
def _small_data(monkeypatch) -> None:
    from manyheads.choose import image_contest as module

    monkeypatch.setattr(module, "_MOST_TRAINING", 200)
    monkeypatch.setattr(module, "_MOST_HELD_OUT", 80)


@pytest.mark.usefixtures("_small_data")
def test_accuracy_of_small_models(tmp_path, capsys) -> None:
    sizes = ["--grid", "6x5", "--dim", "16", "--mixers", "pool,attention", "--threads", "1"]
    data = ["--data", "builtin:digits", "--budget", "9s", "--out", str(tmp_path)]
    assert main(["choose", *sizes, *data]) == 0
    shown = capsys.readouterr().out
    assert "images, equal time" in shown
    values = json.loads((tmp_path / "results.json").read_text())
    assert values["data"]["name"] == "builtin:digits"
    found = {(q["mixer"], q["regime"]): q for q in values["quality"]}
    assert set(found) == {
        (m, r) for m in ("pool", "attention", "softmax") for r in ("seconds", "tokens")
    }
    assert all(0 <= q["value"] <= 1 and q["metric"] == "accuracy" for q in found.values())
    assert found["pool", "seconds"]["details"]["held_out_images"] == 80
    page = (tmp_path / "report.html").read_text()
    assert "Which token mixer?" in page
    assert "Accuracy on held-out images against training seconds" in page
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.usefixtures("_small_data")
def test_the_race_is_fair() -> None:
    """All candidates get the same images in the same order, and none that is held out."""
    results = prepare(TINY.replace(data="builtin:digits"))
    contest = image_contest(results)
    shapes = {
        m: {n: p.shape for n, p in small_metaformer(m, num_classes=10, in_channels=1)
            .named_parameters() if "token_mixer" not in n}
        for m in ("pool", "attention", "softmax")
    }  # fmt: skip
    assert shapes["pool"] == shapes["attention"] == shapes["softmax"]
    torch.manual_seed(0)
    model = contest.build("attention")
    assert contest.loss(model, 5) == contest.loss(model, 5)
    assert contest.loss(model, 5) != contest.loss(model, 6)
    assert 0.05 < contest.chance < 0.3
    assert contest.evaluate(model.eval()).spread > 0


def test_small_models_learn_with_every_mixer() -> None:
    """Every mixer trains in the small model: one step changes its own weights and stays finite."""
    x = torch.randn(4, 1, 32, 32)
    for name in list_mixers():
        model = small_metaformer(name, num_classes=3, in_channels=1)
        model(x).square().mean().backward()
        for key, parameter in model.named_parameters():
            if "token_mixer" in key and parameter.grad is not None:
                assert parameter.grad.isfinite().all(), (name, key)
