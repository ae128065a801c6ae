"""Rotations: every base matrix is Hadamard, transforms are orthogonal, folding is lossless."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.compress.quamba import (
    BASES,
    base_matrix,
    fold_hadamard,
    hadamard_matrix,
    hadamard_split,
    hadamard_transform,
)


@pytest.mark.parametrize("size", BASES)
def test_bases_are_hadamard_matrices(size) -> None:
    h = base_matrix(size)
    assert h.abs().eq(1).all()
    assert torch.equal(h @ h.mT, size * torch.eye(size))


@pytest.mark.parametrize("size", [1, 2, 64, *BASES, 24, 80, 72, 1536, 344])
def test_transforms_are_products_with_an_orthogonal_matrix(size) -> None:
    x = torch.randn(2, 3, size)
    h = hadamard_matrix(size)
    torch.testing.assert_close(hadamard_transform(x), x @ h, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(h @ h.mT, torch.eye(size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [12, 32, 40])
def test_folding_is_lossless(size) -> None:
    layer = nn.Linear(size, 7)
    x = torch.randn(5, size)
    wanted = layer(x)
    torch.testing.assert_close(
        fold_hadamard(layer)(hadamard_transform(x)), wanted, atol=1e-5, rtol=1e-5
    )


def test_splits() -> None:
    assert hadamard_split(1536) == (12, 128)
    assert hadamard_split(5120) == (40, 128)
    assert hadamard_split(4096) == (1, 4096)
    assert hadamard_split(240) == (60, 4)
    for bad in (0, 22, 14, 1000):
        with pytest.raises(ValueError, match=rf"size {bad} has no Hadamard.*12, 20, 28.*172"):
            hadamard_split(bad)
    with pytest.raises(ValueError, match="no base matrix of size 16"):
        base_matrix(16)
