"""Time series of the user's own, from one CSV or npz file, in the form of ``load_series``.

B series, N length of the longest, C channels.
"""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from manyheads.data.series import SeriesData, SeriesSplit

__all__ = ["read_own_series"]

_COLUMNS = ("series", "split", "label")
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class _Part(NamedTuple):
    series: list[np.ndarray]  # (length, C) each
    labels: list[str]


def read_own_series(path: Path) -> SeriesData:
    """Read a labelled set with its split into train and test.

    A CSV file has a header and a row a time step, in order: ``series`` (any name; its rows stand
    together), ``split`` (train or test), ``label``, and further columns of numbers, one a channel.
    An npz file has ``x_train``, ``x_test`` (B, N) or (B, N, C) and ``y_train``, ``y_test`` (B,);
    shorter series end in rows of NaN. A single missing value (an empty cell, NaN) becomes the
    mean. Each channel is normalised by mean and deviation over the training series.

    Raises:
        ValueError: the file is unreadable, lacks a column, array or split, or does not parse;
            names the line or the array.
    """
    reader = {".csv": _read_csv, ".npz": _read_npz}[path.suffix]
    train, test = reader(path)
    for name, part in (("train", train), ("test", test)):
        if not part.series:
            raise ValueError(f"{path} has no {name} series: give both")
    classes = sorted(set(train.labels), key=_natural)
    unseen = sorted(set(test.labels) - set(classes))
    if unseen:
        raise ValueError(f"{path}: label {unseen[0]!r} is in the test series only")
    if len(classes) < 2:
        raise ValueError(f"{path}: all training series have the label {classes[0]!r}")
    steps = np.concatenate(train.series)
    if np.isnan(steps).all(0).any():
        raise ValueError(f"{path}: a channel has no value at all in the training series")
    mean, std = np.nanmean(steps, 0), np.nanstd(steps, 0)
    std[std == 0] = 1.0
    longest = max(len(s) for s in (*train.series, *test.series))
    return SeriesData(
        path.stem,
        _split(train, classes, mean, std, longest),
        _split(test, classes, mean, std, longest),
        tuple(classes),
        torch.from_numpy(mean.astype(np.float32)),
        torch.from_numpy(std.astype(np.float32)),
    )


def _split(
    part: _Part, classes: Sequence[str], mean: np.ndarray, std: np.ndarray, longest: int
) -> SeriesSplit:
    values = np.zeros((len(part.series), longest, len(mean)), dtype=np.float32)
    mask = np.zeros(values.shape[:2], dtype=bool)
    for i, series in enumerate(part.series):
        values[i, : len(series)] = np.nan_to_num((series - mean) / std, nan=0.0)
        mask[i, : len(series)] = True
    labels = [classes.index(label) for label in part.labels]
    return SeriesSplit(torch.from_numpy(values), torch.from_numpy(mask), torch.tensor(labels))


def _read_csv(path: Path) -> tuple[_Part, _Part]:
    parts = {"train": _Part([], []), "test": _Part([], [])}
    rows: list[list[float]] = []
    current: tuple[str, str, str] | None = None
    seen: set[str] = set()

    def finish() -> None:
        if current is not None:
            parts[current[1]].series.append(np.array(rows))
            parts[current[1]].labels.append(current[2])

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = reader.fieldnames or []
            channels = [n for n in names if n not in _COLUMNS]
            missing = [n for n in _COLUMNS if n not in names]
            if missing or not channels:
                raise ValueError(
                    f"{path} needs the columns series, split, label and at least one of numbers; "
                    f"it has: {', '.join(names) or 'none'}"
                )
            for row in reader:
                place = f"{path.name}, line {reader.line_num}"
                key = (row["series"], row["split"], row["label"])
                if key != current:
                    if key[1] not in parts:
                        raise ValueError(f"{place}: split {key[1]!r} is neither train nor test")
                    if key[0] in seen:
                        raise ValueError(
                            f"{place}: series {key[0]!r} began above: its rows must stand "
                            "together, with one split and label"
                        )
                    finish()
                    current, rows = key, []
                    seen.add(key[0])
                rows.append([_number(row[c], c, place) for c in channels])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    finish()
    return parts["train"], parts["test"]


def _number(text: str | None, channel: str, place: str) -> float:
    try:
        return float(text) if text and text.strip() else np.nan
    except ValueError:
        raise ValueError(f"{place}: {channel} {text!r} is no number") from None


def _read_npz(path: Path) -> tuple[_Part, _Part]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [n for n in _ARRAYS if n not in file]
            if missing:
                raise ValueError(
                    f"{path} needs the arrays {', '.join(_ARRAYS)}; it has: {', '.join(file)}"
                )
            arrays = {n: file[n] for n in _ARRAYS}
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    parts = [_part(path, arrays, split) for split in ("train", "test")]
    widths = {s.shape[1] for part in parts for s in part.series}
    if len(widths) > 1:
        raise ValueError(f"{path}: x_train and x_test have {sorted(widths)} channels, need as many")
    return parts[0], parts[1]


def _part(path: Path, arrays: dict[str, np.ndarray], split: str) -> _Part:
    x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or y.shape != x.shape[:1] or x.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: x_{split} of {x.dtype} {x.shape} and y_{split} {y.shape}: need numbers "
            "(B, N) or (B, N, C), and labels (B,)"
        )
    known = np.logical_not(np.all(np.isnan(x.astype(np.float64)), axis=2))  # (B, N)
    lengths = x.shape[1] - np.argmax(known[:, ::-1], axis=1)
    empty = np.flatnonzero(~np.any(known, axis=1))
    if len(empty):
        raise ValueError(f"{path}: x_{split}[{empty[0]}] has no value at all")
    series = [row[:n].astype(np.float64) for row, n in zip(x, lengths, strict=True)]
    return _Part(series, [str(label) for label in y.tolist()])


def _natural(label: str) -> tuple[float, str]:
    try:
        return float(label), label
    except ValueError:
        return np.inf, label
