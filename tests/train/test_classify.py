"""The classifier: every test series counts once, ragged ones as they are, the test set is not used
to choose, and the user's own files are read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from manyheads.cli import main
from manyheads.data import SeriesSplit, load_series
from manyheads.models import load_model
from manyheads.train.classify import ClassifyOptions, SeriesBatches, hold_out
from manyheads.train.own_series import read_own_series
from train.compare_runs import assert_equal_to_the_bit, figures, metrics

TINY = (
    "--mixers", "softmax,gla", "--embed-dim", "20", "--num-heads", "2", "--batch-size", "7",
    "--steps", "30", "--eval-every", "15", "--learning-rate", "3e-3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def classify(*words: object) -> int:
    return main(["train", "classify", *TINY, *map(str, words)])


def ragged(seed: int = 0) -> SeriesSplit:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (23,), generator=rng)
    mask = torch.arange(11) < lengths[:, None]
    values = torch.randn(23, 11, 2, generator=rng) * mask[..., None]
    return SeriesSplit(values, mask, torch.arange(23) % 3)


def test_accuracy_is_over_all_test_series(tmp_path) -> None:
    assert classify("--data", "japanese_vowels", "--out", "run") == 0
    found = figures(tmp_path / "run")
    assert found["test_series"] == 370
    test = load_series("japanese_vowels").test
    model = load_model(tmp_path / "run").eval()
    right = 0
    for values, mask, label in zip(*test, strict=True):
        # One by one and unpadded.
        with torch.no_grad():
            right += int(model(values[None, mask]).argmax() == label)
    assert found["right"] == right
    assert found["test_accuracy"] == right / 370
    described = json.loads((tmp_path / "run" / "data.json").read_text())
    assert len(described["class_names"]) == 9
    assert len(described["mean"]) == len(described["std"]) == 12


def test_it_learns(tmp_path) -> None:
    classify("--data", "basic_motions", "--out", "run", "--steps", 60)
    assert figures(tmp_path / "run")["test_accuracy"] >= 0.9
    losses = [float(r["loss"]) for r in metrics(tmp_path / "run") if r["loss"]]
    assert losses[-1] < 0.5 * losses[0]


def test_the_test_series_choose_nothing(tmp_path, capsys) -> None:
    # Changing them changes no weight and nothing that is shown on the way.
    write_npz(Path("a.npz"))
    write_npz(Path("b.npz"), test_seed=9)
    for name in ("a", "b"):
        assert classify("--data", f"{name}.npz", "--out", name, "--valid-fraction", 0.3) == 0
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    found = figures(tmp_path / "a")
    curve = [float(r["valid_accuracy"]) for r in metrics(tmp_path / "a") if r["valid_accuracy"]]
    assert found["valid_accuracy"] == max(curve)


def test_interrupted_it_goes_on_to_the_bit(tmp_path, monkeypatch) -> None:
    import signal

    usual = SeriesBatches.batch

    def batch(self, step: int):
        if step == 11:
            signal.raise_signal(signal.SIGINT)
        return usual(self, step)

    words = ("--data", "basic_motions", "--dropout", 0.2)
    classify(*words, "--out", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(SeriesBatches, "batch", batch)
        assert classify(*words, "--out", "run") == 130
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert classify(*words, "--out", "run") == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")


def test_batches_deal_every_series_once_an_epoch() -> None:
    split = ragged()
    split = split._replace(labels=torch.arange(23))
    batches = SeriesBatches(split, batch_size=5, seed=1)
    dealt = torch.cat([batches.batch(k).labels for k in range(23)])
    for epoch in dealt.view(5, 23):
        assert epoch.sort().values.tolist() == list(range(23))
    assert not torch.equal(dealt[:23], dealt[23:46])
    other = SeriesBatches(split, batch_size=5, seed=1)
    assert torch.equal(other.batch(7).labels, batches.batch(7).labels)


def test_two_processes_see_the_batch_of_one() -> None:
    split = ragged()
    one = SeriesBatches(split, batch_size=6, seed=2).batch(5)
    two = [
        SeriesBatches(split, batch_size=3, seed=2, rank=r, world_size=2).batch(5) for r in range(2)
    ]
    assert torch.equal(torch.cat([b.labels for b in two]), one.labels)
    for half, rows in zip(two, (slice(0, 3), slice(3, 6)), strict=True):
        length = half.values.shape[1]
        assert torch.equal(half.values, one.values[rows, :length])
        assert not one.mask[rows, length:].any()


def test_holding_out_takes_of_every_class() -> None:
    split = ragged()
    train, valid = hold_out(split, 0.25, seed=0)
    assert valid is not None
    assert len(train.labels) + len(valid.labels) == 23
    assert valid.labels.bincount().tolist() == [2, 2, 2]
    assert hold_out(split, 0.0, seed=0) == (split, None)
    again = hold_out(split, 0.25, seed=0)[1]
    assert torch.equal(again.values, valid.values)
    with pytest.raises(ValueError, match="leaves no training series of a class that has 8"):
        hold_out(split, 0.95, seed=0)


def test_a_share_that_leaves_nothing_is_refused_before_any_work(capsys) -> None:
    assert classify("--data", "basic_motions", "--valid-fraction", 0.99, "--out", "run") == 2
    assert "leaves no training series" in capsys.readouterr().err
    assert not Path("run").exists()


def write_npz(path: Path, *, test_seed: int = 1) -> None:
    arrays = {}
    for split, seed in (("train", 0), ("test", test_seed)):
        values, mask, labels = ragged(seed)
        x = values.numpy().astype(np.float64) + labels.numpy()[:, None, None]
        x[~mask.numpy()] = np.nan
        arrays |= {f"x_{split}": x, f"y_{split}": np.array(["abc"[k] for k in labels])}
    np.savez(path, **arrays)


def write_csv(path: Path) -> None:
    lines = ["series,split,label,u,v"]
    for split, seed in (("train", 0), ("test", 1)):
        values, mask, labels = ragged(seed)
        for i, (rows, real, label) in enumerate(zip(values, mask, labels, strict=True)):
            lines += [
                f"{split}{i},{split},{'abc'[label]},{u + label},{v + label}" for u, v in rows[real]
            ]
    path.write_text("\n".join(lines) + "\n")


def test_csv_and_npz_say_the_same() -> None:
    write_npz(Path("a.npz"))
    write_csv(Path("a.csv"))
    npz, csv = read_own_series(Path("a.npz")), read_own_series(Path("a.csv"))
    assert npz.class_names == csv.class_names == ("a", "b", "c")
    for split in ("train", "test"):
        ours, theirs = getattr(npz, split), getattr(csv, split)
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.allclose(ours.values, theirs.values, atol=1e-6)
    real = npz.train.values[npz.train.mask]
    assert torch.allclose(real.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(real.std(0, correction=0), torch.ones(2), atol=1e-6)
    assert not npz.train.values[~npz.train.mask].any()


def test_a_run_on_a_file_of_ones_own(tmp_path) -> None:
    write_csv(Path("mine.csv"))
    assert classify("--data", "mine.csv", "--out", "run", "--pool", "last") == 0
    assert figures(tmp_path / "run")["test_series"] == 23


def test_missing_values_and_labels_that_are_numbers() -> None:
    Path("a.csv").write_text(
        "series,split,label,x\np,train,10,1\np,train,10,\np,train,10,3\nq,train,9,5\nr,test,9,4\n"
    )
    data = read_own_series(Path("a.csv"))
    assert data.class_names == ("9", "10")
    assert data.train.labels.tolist() == [1, 0]
    assert data.mean.item() == 3
    assert data.train.values[0, :, 0].tolist()[1] == 0
    assert data.train.mask.sum(1).tolist() == [3, 1]
    np.savez("one.npz", x_train=np.ones((2, 3)), y_train=[0, 1], x_test=np.ones((1, 3)), y_test=[1])
    assert not read_own_series(Path("one.npz")).train.values.any()


HEAD = "series,split,label,x\n"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a,b\n1,2\n", "needs the columns series, split, label"),
        ("series,split,label\np,train,1\n", "at least one of numbers"),
        (HEAD + "p,train,1,1\nq,train,2,2\n", "has no test series"),
        (HEAD + "p,valid,1,1\n", "line 2: split 'valid' is neither train nor test"),
        (HEAD + "p,train,1,one\n", "line 2: x 'one' is no number"),
        (HEAD + "p,train,1,1\nq,train,2,1\np,train,1,1\n", "line 4: series 'p' began above"),
        (HEAD + "p,train,1,1\np,train,2,1\n", "line 3: series 'p' began above"),
        (HEAD + "p,train,1,1\nq,train,2,2\nr,test,3,1\n", "label '3' is in the test series only"),
        (HEAD + "p,train,1,1\nr,test,1,1\n", "all training series have the label '1'"),
        (HEAD + "p,train,1,\nq,train,2,\nr,test,1,1\n", "a channel has no value at all"),
    ],
)
def test_wrong_csv(text, match, capsys) -> None:
    Path("a.csv").write_text(text)
    assert classify("--data", "a.csv", "--out", "run") == 2
    shown = capsys.readouterr().err
    assert match in shown
    assert shown.count("\n") == 1
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"y_test": None}, "needs the arrays x_train, y_train, x_test, y_test; it has: x_train"),
        ({"x_train": np.ones(3)}, "need numbers (B, N) or (B, N, C)"),
        ({"y_train": np.ones(7)}, "labels (B,)"),
        ({"x_test": np.ones((23, 4, 5))}, "[2, 5] channels"),
        ({"x_test": np.full((23, 4, 2), np.nan)}, "x_test[0] has no value at all"),
        ({"x_train": np.array(["a"] * 23)[:, None]}, "need numbers"),
    ],
)
def test_wrong_npz(changes, match, capsys) -> None:
    write_npz(Path("a.npz"))
    with np.load("a.npz") as file:
        arrays = {k: v for k, v in ({**file} | changes).items() if v is not None}
    np.savez("a.npz", **arrays)
    assert classify("--data", "a.npz", "--out", "run") == 2
    assert match in capsys.readouterr().err


def test_what_cannot_be_read(capsys) -> None:
    Path("a.npz").write_bytes(b"nothing")
    Path("b.npz").write_bytes(b"PK\x03\x04 cut")
    np.savez("c.npz", x_train=np.array([{}], dtype=object))
    Path("a.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("a.npz", "b.npz", "c.npz", "a.csv"):
        assert classify("--data", name, "--out", "run") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert classify("--data", "japanese_vowel", "--out", "run") == 2
    assert "did you mean 'japanese_vowels'" in capsys.readouterr().err


def test_layers_that_share_their_attention(tmp_path) -> None:
    assert classify("--out", "run", "--share-attention", 1, "--mixers", "softmax*3") == 0
    model = load_model(tmp_path / "run")
    assert set(model.shared_atoms) == {"query", "key", "value", "output"}
    assert model.config.sharing == {"atoms": 1}
    options = ("--sharing", '{"kind": "low-rank"}', "--share-attention", 2)
    assert classify("--out", "other", *options, "--mixers", "softmax*4") == 0
    assert not hasattr(load_model(tmp_path / "other"), "shared_atoms")


def test_three_layers_for_each_shared_matrix() -> None:
    options = ClassifyOptions(share_attention=2).resolved()
    assert options.mixers == "softmax*6"
    assert "--share-attention 2" in options.command()
    assert ClassifyOptions(share_attention=2, num_layers=2).resolved().mixers == "softmax*2"
    assert ClassifyOptions().resolved().mixers == "softmax*2"
    with pytest.raises(ValueError, match="needs share_attention"):
        ClassifyOptions(sharing='{"kind": "repeat"}')
    with pytest.raises(ValueError, match="share_attention is 0"):
        ClassifyOptions(share_attention=0)
