"""What two runs must have in common to be equal."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from compare import relative_error
from manyheads.models import load_model
from manyheads.train.checkpoint import read_checkpoint

TIMES = {"seconds", "tokens_per_s", "series_per_s", "images_per_s", "sentences_per_s"}


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the times."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def figures(folder: Path) -> dict[str, float]:
    """The figures of results.json without the times."""
    read = json.loads((folder / "results.json").read_text())["figures"]
    return {k: v for k, v in read.items() if k not in TIMES}


def assert_equal_to_the_bit(a: Path, b: Path) -> None:
    (tensors_a, at_a), (tensors_b, at_b) = (
        read_checkpoint(folder / "checkpoint.safetensors") for folder in (a, b)
    )
    assert tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        # Nothing here draws from Python's own generator, but the test runner may.
        if name != "rng.python":
            assert torch.equal(tensor, tensors_b[name]), name
    assert {k: v for k, v in at_a.items() if k != "seconds"} == {
        k: v for k, v in at_b.items() if k != "seconds"
    }
    assert metrics(a) == metrics(b)
    assert figures(a) == figures(b)
    files = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert files[0] == files[1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in (a, b)]
    assert weights[0] == weights[1]


def assert_equal_to_rounding(a: Path, b: Path) -> None:
    rows_a, rows_b = metrics(a), metrics(b)
    # One writer: no row twice.
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b]
    for row_a, row_b in zip(rows_a, rows_b, strict=True):
        for name, value in row_a.items():
            if value or row_b[name]:
                # Loss, norm of the gradient, rate and held-out figure.
                assert float(value) == pytest.approx(float(row_b[name]), rel=2e-5), name
    for name, value in figures(a).items():
        # The number of held-out bytes is equal: nothing counts twice, nothing is left out.
        assert value == pytest.approx(figures(b)[name], rel=2e-5), name
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1]
    states = [dict(load_model(folder).named_parameters()) for folder in (a, b)]
    for name, parameter in states[0].items():
        assert relative_error(parameter, states[1][name]) < 2e-3, name
