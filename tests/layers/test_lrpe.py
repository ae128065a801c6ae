"""LRPE: relative, orthogonal, learned."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.layers.lrpe import LRPE


@pytest.mark.parametrize("dim", [8, 7, 2])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("householder", [True, False])
def test_products_depend_on_the_distance_alone(dim, learned, householder) -> None:
    encoding = LRPE(dim, learned=learned, householder=householder).double()
    q, k = torch.randn(dim).double(), torch.randn(dim).double()
    places = torch.arange(30)
    same_q, same_k = encoding(
        q.expand(1, 1, 30, dim), k.expand(1, 1, 30, dim), places
    )  # every place holds the same token
    products = (same_q @ same_k.mT)[0, 0]
    for distance in (0, 1, 7, 29):
        line = products.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-5)
    length = q.norm().expand(1, 1, 30)  # v is a unit vector in float32
    torch.testing.assert_close(same_q.norm(dim=-1), length, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(products.diagonal(), (q @ k).expand(30), rtol=1e-6, atol=1e-6)


def test_starts_as_the_published_angles_and_reflects() -> None:
    encoding = LRPE(8)
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    torch.testing.assert_close(encoding.theta.flatten(), expected)
    assert encoding.theta.shape == (1, 1, 4)
    x = torch.randn(2, 3, 5, 8)
    at_zero = encoding.turn(x, *encoding.angles(torch.zeros(5, dtype=torch.long)))
    v = encoding.v
    assert_close(at_zero, x - 2 * (x @ v)[..., None] * v, 1e-5)
    assert_close(encoding.turn(at_zero, *encoding.angles(torch.zeros(5))), x, 1e-5)


def test_pairs_are_neighbours_and_an_odd_channel_stays() -> None:
    encoding = LRPE(5, learned=False, householder=False)
    x = torch.randn(1, 1, 4, 5)
    y = encoding.turn(x, *encoding.angles(torch.arange(4)))
    assert torch.equal(y[..., 4], x[..., 4])
    angle = torch.arange(4.0)
    a, b = x[..., 0], x[..., 1]
    assert_close(y[..., 0], a * angle.cos() - b * angle.sin(), 1e-6)
    assert_close(y[..., 1], b * angle.cos() + a * angle.sin(), 1e-6)


def test_angles_learn_and_the_vector_does_not() -> None:
    encoding = LRPE(8)
    q, k = encoding(torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8), torch.arange(9))
    (q @ k.mT).square().sum().backward()
    assert encoding.theta.grad.abs().sum() > 0
    assert not encoding.v.requires_grad
    assert {k for k, _ in LRPE(8, learned=False, householder=False).named_parameters()} == set()


def test_positions_may_differ_by_row_and_half_precision_keeps_wide_angles() -> None:
    encoding = LRPE(8)
    x = torch.randn(2, 3, 6, 8)
    places = torch.stack((torch.arange(6), torch.arange(6) + 3000))
    rows = encoding.turn(x, *encoding.angles(places))
    for i in range(2):
        assert_close(
            rows[i : i + 1], encoding.turn(x[i : i + 1], *encoding.angles(places[i])), 1e-6
        )
    cos, _ = encoding.bfloat16().angles(places)
    assert cos.dtype == torch.float32
    assert encoding.turn(x.bfloat16(), *encoding.angles(places)).dtype == torch.bfloat16


def test_too_narrow_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim 1"):
        LRPE(1)
