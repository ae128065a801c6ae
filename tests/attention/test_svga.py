"""SVGA on maps: the shortcuts against the graph, link by link."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.attention.grid import build_mixer
from manyheads.attention.grid.svga import SVGA, svga, svga_reference
from manyheads.choose.memory import peak_memory

SIZES = [(7, 7), (12, 10), (5, 8), (1, 9), (2, 2), (1, 1), (16, 3), (23, 29)]


def by_edges(x: torch.Tensor, step: int) -> torch.Tensor:
    """The definition place by place, in plain loops."""
    height, width = x.shape[2:]
    out = torch.zeros_like(x)
    for h in range(height):
        for w in range(width):
            here = x[:, :, h, w]
            linked = [x[:, :, (h - i) % height, w] for i in range(step, height, step)]
            linked += [x[:, :, h, (w - j) % width] for j in range(step, width, step)]
            for there in linked:
                out[:, :, h, w] = torch.maximum(out[:, :, h, w], here - there)
    return out


@pytest.mark.parametrize("step", [1, 2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_graph_bit_for_bit(size, step) -> None:
    x = torch.randn(3, 5, *size)
    assert torch.equal(svga_reference(x, step=step), by_edges(x, step))
    assert torch.equal(svga(x, step=step), by_edges(x, step))
    wide = x.to(memory_format=torch.channels_last)
    assert torch.equal(svga(wide, step=step), by_edges(x, step))


@pytest.mark.parametrize("size", [(7, 5), (6, 12)])
def test_gradients_equal_the_references(size) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn_like(x)
    found = []
    for fn in (svga, svga_reference):
        leaf = x.clone().requires_grad_()
        (fn(leaf) * weight).sum().backward()
        found.append(leaf.grad)
    assert_close(found[0], found[1], 1e-12, "gradient")


def test_outputs_move_along_with_the_map() -> None:
    layer = build_mixer("svga", 8, step=3).eval()
    x = torch.randn(1, 8, 7, 10)
    moved = x.roll((2, 5), (2, 3))
    assert_close(layer(moved), layer(x).roll((2, 5), (2, 3)), 1e-5)


def test_memory_is_linear_in_places() -> None:
    sizes = [peak_memory(svga, torch.randn(1, 16, n, n)).peak_bytes for n in (16, 64)]
    assert sizes[1] <= 16 * sizes[0] * 1.1


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="3 axes"):
        svga(torch.randn(2, 4, 5))
    with pytest.raises(ValueError, match="step 0"):
        svga(torch.randn(1, 2, 4, 5), step=0)
    with pytest.raises(ValueError, match="step 0"):
        SVGA(8, step=0)
    with pytest.raises(ValueError, match="no option 'k'"):
        build_mixer("svga", 8, k=3)
