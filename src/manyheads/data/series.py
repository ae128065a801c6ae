"""Labelled time series: sets of the UCR and UEA archives that ship inside the package aeon.

B series, N padded length, C channels. The files are read where the package lies; aeon itself is
not imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.data.ts_file import SeriesFile, read_ts
from manyheads.errors import require_extra, unknown_name

__all__ = ["SERIES", "SeriesData", "SeriesSplit", "load_series"]

# Our name and the archives' name.
SERIES = {
    "acsf1": "ACSF1",
    "arrow_head": "ArrowHead",
    "basic_motions": "BasicMotions",
    "gun_point": "GunPoint",
    "italy_power_demand": "ItalyPowerDemand",
    "japanese_vowels": "JapaneseVowels",
    "osu_leaf": "OSULeaf",
    "pickup_gesture": "PickupGestureWiimoteZ",
}


class SeriesSplit(NamedTuple):
    """Series, padded on the right to the longest of both splits.

    Attributes:
        values: (B, N, C) float32, zero under the padding.
        mask: (B, N) bool, True = measured.
        labels: (B,) int64, index into ``class_names``.
    """

    values: Tensor
    mask: Tensor
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) measured steps of each series."""
        return self.mask.sum(1)


@dataclass(frozen=True, slots=True)
class SeriesData:
    """One classification problem with the archive's own split.

    Attributes:
        name: the archive's name.
        train, test: the official split, in file order, nothing left out.
        class_names: in the order of the file header.
        mean, std: (C,) statistics of the training series that were applied to both splits (0 and
            1 where nothing was applied).
    """

    name: str
    train: SeriesSplit
    test: SeriesSplit
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor


def load_series(name: str | os.PathLike[str], *, normalise: bool = True) -> SeriesData:
    """Read one problem.

    Args:
        name: a key of `SERIES`, or a folder with ``<NAME>_TRAIN.ts`` and ``<NAME>_TEST.ts``.
        normalise: subtract the mean and divide by the standard deviation of each channel over all
            steps of the training series; a missing value becomes the mean, which is 0.

    Raises:
        ValueError: an unknown name, a folder without the two files, a file that does not parse,
            or missing values with ``normalise=False``.
        MissingExtraError: a built-in name, and aeon is not installed.
    """
    folder = Path(name)
    if os.fspath(name) not in SERIES and folder.is_dir():
        train_path, test_path = _pair(folder)
        title = train_path.name.removesuffix("_TRAIN.ts")
    else:
        if os.fspath(name) not in SERIES:
            raise unknown_name("series", os.fspath(name), SERIES)
        title = SERIES[os.fspath(name)]
        folder = _aeon_folder() / title
        train_path, test_path = (folder / f"{title}_{part}.ts" for part in ("TRAIN", "TEST"))
        if not (train_path.is_file() and test_path.is_file()):
            raise ValueError(
                f"the installed aeon does not ship {title}: pip install 'aeon==1.6.0', or give a "
                "folder with the .ts files"
            )
    train, test = read_ts(train_path), read_ts(test_path)
    if set(train.class_names) != set(test.class_names):
        raise ValueError(f"{title}: the headers of the train and test files list different classes")
    channels = {s.shape[1] for s in (*train.series, *test.series)}
    if len(channels) != 1:
        raise ValueError(f"{title}: train and test have {sorted(channels)} channels, need as many")

    steps = np.concatenate(train.series)  # all training steps, (sum of N, C)
    if normalise:
        known = np.maximum((~np.isnan(steps)).sum(0), 1)
        mean = np.nansum(steps, axis=0) / known
        std = np.sqrt(np.nansum((steps - mean) ** 2, axis=0) / known)
        std[std == 0] = 1.0
    else:
        mean, std = np.zeros(steps.shape[1]), np.ones(steps.shape[1])
        if any(np.isnan(s).any() for s in (*train.series, *test.series)):
            raise ValueError(f"{title} has missing values: load it with normalise=True")
    longest = max(len(s) for s in (*train.series, *test.series))
    return SeriesData(
        title,
        _split(train, train.class_names, mean, std, longest),
        _split(test, train.class_names, mean, std, longest),
        train.class_names,
        torch.from_numpy(mean.astype(np.float32)),
        torch.from_numpy(std.astype(np.float32)),
    )


def _split(
    file: SeriesFile, class_names: tuple[str, ...], mean: np.ndarray, std: np.ndarray, longest: int
) -> SeriesSplit:
    values = np.zeros((len(file.series), longest, len(mean)), dtype=np.float32)
    mask = np.zeros((len(file.series), longest), dtype=bool)
    for i, series in enumerate(file.series):
        values[i, : len(series)] = np.nan_to_num((series - mean) / std, nan=0.0)
        mask[i, : len(series)] = True
    labels = [class_names.index(label) for label in file.labels]
    return SeriesSplit(torch.from_numpy(values), torch.from_numpy(mask), torch.tensor(labels))


def _aeon_folder() -> Path:
    require_extra("aeon", "data", "this series")
    spec = find_spec("aeon")  # finds the package without running it
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0], "datasets", "data")


def _pair(folder: Path) -> tuple[Path, Path]:
    trains = sorted(folder.glob("*_TRAIN.ts"))
    if len(trains) != 1:
        raise ValueError(
            f"folder {str(folder)!r} has {len(trains)} files *_TRAIN.ts: give a folder with one "
            "and its *_TEST.ts"
        )
    test = trains[0].with_name(trains[0].name.replace("_TRAIN.ts", "_TEST.ts"))
    if not test.is_file():
        raise ValueError(f"folder {str(folder)!r} has no {test.name} beside {trains[0].name}")
    return trains[0], test
