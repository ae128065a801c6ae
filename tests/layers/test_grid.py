"""Learned positions of a grid for other sizes."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.layers.grid import resize_positions


def test_the_same_size_is_the_same_tensor() -> None:
    positions = torch.randn(1, 49, 5)
    assert resize_positions(positions, (7, 7)) is positions


@pytest.mark.parametrize("size", [(14, 14), (5, 9), (1, 3)])
def test_other_sizes_keep_a_plane(size) -> None:
    """A linear ramp over the rows stays one, up to the border."""
    rows = (torch.arange(7.0) + 0.5) / 7
    positions = rows.repeat_interleave(7).view(1, 49, 1).expand(-1, -1, 3)
    out = resize_positions(positions, size).unflatten(1, size)
    expected = ((torch.arange(size[0]) + 0.5) / size[0])[:, None].expand(size)
    inner = slice(size[0] // 4, size[0] - size[0] // 4)
    assert_close(out[0, inner, :, 0], expected[inner], 2e-2)
    assert resize_positions(positions.half(), size).dtype == torch.float16


def test_what_is_no_square_is_an_error() -> None:
    with pytest.raises(ValueError, match="50 positions are no square grid"):
        resize_positions(torch.zeros(1, 50, 3), (7, 7))
