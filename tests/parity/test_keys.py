"""Models of published size have exactly the official parameters, names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manyheads.models import create_model, get_variant
from parity.adapters import implemented
from parity.golden import KEYS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("--golden")
    files = sorted(folder.glob("*/keys_*.json"))
    metafunc.parametrize("path", files, ids=[f"{f.parent.name}/{f.stem}" for f in files])


def test_keys(path: Path) -> None:
    slug = path.parent.name
    if slug not in implemented():
        pytest.skip(f"{slug} is not in the library yet")
    listed = json.loads(path.read_text())
    if slug in KEYS:
        built = KEYS[slug](listed)
        assert sum(p.numel() for p in built.parameters()) == listed["params"]
        names = {k: list(t.shape) for k, t in built.state_dict().items()}
        assert names == listed["state_dict"]
        return
    assert get_variant(listed["variant"]).slug == slug
    model = create_model(listed["variant"], device="meta")
    assert model.num_parameters() == listed["params"]
    shapes = {k: tuple(s) for k, s in listed["state_dict"].items()}
    model.load_official({k: torch.empty(s, device="meta") for k, s in shapes.items()})
    assert model.num_parameters() == listed["params"]
    assert {k: tuple(t.shape) for k, t in model.to_official().items()} == shapes
