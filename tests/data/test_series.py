"""Time series: the official splits, whole, ragged ones with their lengths."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from manyheads.data import SERIES, load_series
from manyheads.errors import MissingExtraError

HEADER = "# a comment\n@problemName Toy\n@timeStamps false\n@classLabel true up down\n@data\n"


def write(folder: Path, train: str, test: str, *, header: str = HEADER) -> Path:
    (folder / "Toy_TRAIN.ts").write_text(header + train)
    (folder / "Toy_TEST.ts").write_text(header + test)
    return folder


def test_a_folder_of_ts_files(tmp_path: Path) -> None:
    data = load_series(
        write(tmp_path, "1,3:10,10:up\n5:10:down\n", "7,9,11:10,20,30:up\n"), normalise=False
    )
    assert data.name == "Toy"
    assert data.class_names == ("up", "down")
    assert data.train.values.shape == (2, 3, 2)
    assert data.train.values.dtype == torch.float32
    assert data.train.values[0].tolist() == [[1, 10], [3, 10], [0, 0]]
    assert data.train.mask.tolist() == [[True, True, False], [True, False, False]]
    assert data.train.labels.tolist() == [0, 1]
    assert data.train.lengths.tolist() == [2, 1]
    assert data.test.values[0].tolist() == [[7, 10], [9, 20], [11, 30]]


def test_statistics_come_from_the_training_series_alone(tmp_path: Path) -> None:
    data = load_series(write(tmp_path, "1,3:10,10:up\n5:10:down\n", "7,?,11:10,20,30:up\n"))
    assert data.mean.tolist() == [3, 10]
    assert data.std.tolist() == pytest.approx([(8 / 3) ** 0.5, 1])  # a constant channel: 1
    expected = [4 / (8 / 3) ** 0.5, 0, 8 / (8 / 3) ** 0.5]  # the missing value is the mean
    assert data.test.values[0, :, 0].tolist() == pytest.approx(expected)
    assert data.test.values[0, :, 1].tolist() == [0, 10, 20]
    assert (data.train.values[~data.train.mask] == 0).all()


@pytest.mark.parametrize(
    ("train", "header", "message"),
    [
        ("1,2:sideways\n", HEADER, "Toy_TRAIN.ts, line 6: class 'sideways' is none of up, down"),
        ("1,2:up\n1:2:up\n", HEADER, "line 7: 2 channels, 1 before"),
        ("1,2:1:up\n", HEADER, r"channels have lengths \[1, 2\]"),
        ("1,x:up\n", HEADER, "line 6: could not convert"),
        ("", HEADER, "no data lines"),
        ("1:up\n", HEADER.replace("@timeStamps false", "@timeStamps true"), "time stamps"),
        ("1:2.5\n", "@targetlabel true\n@data\n", "no class labels"),
        ("1,?:up\n", HEADER, "missing values"),
    ],
)
def test_files_that_do_not_parse(tmp_path: Path, train: str, header: str, message: str) -> None:
    write(tmp_path, train, "1,2:up\n", header=header)
    with pytest.raises(ValueError, match=message):
        load_series(tmp_path, normalise=False)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 0 files \*_TRAIN.ts"):
        load_series(tmp_path)
    write(tmp_path, "1,2:up\n", "1:2:up\n")
    with pytest.raises(ValueError, match=r"have \[1, 2\] channels"):
        load_series(tmp_path)
    (tmp_path / "Toy_TEST.ts").write_text(HEADER.replace("down", "side") + "1:up\n")
    with pytest.raises(ValueError, match="different classes"):
        load_series(tmp_path)
    (tmp_path / "Toy_TEST.ts").unlink()
    with pytest.raises(ValueError, match=r"no Toy_TEST\.ts beside"):
        load_series(tmp_path)


def test_unknown_names_and_the_missing_package(monkeypatch) -> None:
    with pytest.raises(ValueError, match="did you mean 'basic_motions'"):
        load_series("basic_motion")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"aeon.*manyheads\[data\]"):
        load_series("basic_motions")


# Series in train and test, classes, channels, shortest and longest series of all.
FACTS = {
    "acsf1": (100, 100, 10, 1, 1460, 1460),
    "arrow_head": (36, 175, 3, 1, 251, 251),
    "basic_motions": (40, 40, 4, 6, 100, 100),
    "gun_point": (50, 150, 2, 1, 150, 150),
    "italy_power_demand": (67, 1029, 2, 1, 24, 24),
    "japanese_vowels": (270, 370, 9, 12, 7, 29),
    "osu_leaf": (200, 242, 6, 1, 427, 427),
    "pickup_gesture": (50, 50, 10, 1, 29, 361),
}


def need_aeon() -> None:
    if find_spec("aeon") is None:
        pytest.skip("needs the package aeon")


@pytest.mark.realdata
@pytest.mark.parametrize("name", sorted(SERIES))
def test_archive_sets_are_whole(name: str) -> None:
    need_aeon()
    data = load_series(name)
    lengths = torch.cat([data.train.lengths, data.test.lengths])
    assert FACTS[name] == (
        len(data.train.values),
        len(data.test.values),
        len(data.class_names),
        data.train.values.shape[2],
        int(lengths.min()),
        int(lengths.max()),
    )
    for split in (data.train, data.test):
        assert split.values.shape[:2] == split.mask.shape
        assert torch.isfinite(split.values).all()
        assert (split.values[~split.mask] == 0).all()
        assert len(split.labels.unique()) == len(data.class_names)
    steps = data.train.values[data.train.mask].double()
    assert steps.mean(0).abs().max() < 1e-5
    assert (steps.std(0, correction=0) - 1).abs().max() < 1e-5


@pytest.mark.realdata
def test_values_are_those_of_the_file() -> None:
    need_aeon()
    data = load_series("japanese_vowels", normalise=False)
    assert data.train.values[0, :3, 0].tolist() == pytest.approx([1.860936, 1.891651, 1.939205])
    assert data.train.values[0, 0, :3].tolist() == pytest.approx([1.860936, -0.207383, 0.261557])
    assert data.train.lengths[0] == 20
    assert torch.equal(data.train.labels.bincount(), torch.full((9,), 30))


@pytest.mark.realdata
def test_aeon_itself_is_not_imported() -> None:
    need_aeon()
    code = (
        "import sys; from manyheads.data import load_series; load_series('gun_point');"
        "print(sorted({'aeon', 'numba', 'sklearn', 'pandas'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
