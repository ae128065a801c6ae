"""The ``.ts`` text format of the UCR and UEA time-series archives, read without its own library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["SeriesFile", "read_ts"]


@dataclass(frozen=True, slots=True)
class SeriesFile:
    """The content of one file.

    Attributes:
        series: one (length, channels) float64 array a line; NaN where a value is missing.
        labels: one class name a line.
        class_names: the names the header lists, in its order.
    """

    series: list[np.ndarray]
    labels: list[str]
    class_names: tuple[str, ...]


def read_ts(path: Path) -> SeriesFile:
    """Read one ``.ts`` file of a classification problem.

    Raises:
        ValueError: no readable file, time stamps, no class labels, or a line that does not parse;
            names the file and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    names: tuple[str, ...] = ()
    series: list[np.ndarray] = []
    labels: list[str] = []
    in_data = False
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if in_data:
            *channels, label = line.split(":")
            place = f"{path.name}, line {number}"
            series.append(_parse(channels, place))
            if label.strip() not in names:
                raise ValueError(f"{place}: class {label.strip()!r} is none of {', '.join(names)}")
            if series[-1].shape[1] != series[0].shape[1]:
                raise ValueError(
                    f"{place}: {series[-1].shape[1]} channels, {series[0].shape[1]} before"
                )
            labels.append(label.strip())
            continue
        keyword, *values = line.split()
        keyword = keyword.lower()
        if keyword == "@timestamps" and values[:1] and values[0].lower() == "true":
            raise ValueError(f"{path.name} has time stamps: give series of plain values")
        if keyword == "@classlabel" and values[:1] and values[0].lower() == "true":
            names = tuple(values[1:])
        if keyword == "@data":
            if not names:
                raise ValueError(f"{path.name} has no class labels: give a classification problem")
            in_data = True
    if not series:
        raise ValueError(f"{path.name} has no data lines: give a .ts file with @data and series")
    return SeriesFile(series, labels, names)


def _parse(channels: list[str], place: str) -> np.ndarray:
    columns = []
    for channel in channels:
        try:
            columns.append(np.array(channel.replace("?", "nan").split(","), dtype=np.float64))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    lengths = {len(c) for c in columns}
    if len(lengths) != 1:
        raise ValueError(f"{place}: channels have lengths {sorted(lengths)}, need one length")
    return np.stack(columns, axis=1)
