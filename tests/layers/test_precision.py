"""Custom operators keep the precision of their tensors under autocast."""

from __future__ import annotations

import torch

from manyheads.layers.linear import causal_linear
from manyheads.layers.precision import without_autocast


def test_autocast_stops_at_the_border() -> None:
    product = without_autocast(lambda x: x @ x)
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        assert product(x).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")


def test_causal_linear_is_exact_under_autocast() -> None:
    q, k, v = (torch.randn(1, 2, 63, 20) for _ in range(3))
    expected, _ = causal_linear(q, k, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = causal_linear(q, k, v)
    assert torch.equal(out, expected)
