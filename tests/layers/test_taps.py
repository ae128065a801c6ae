"""Sums of shifted copies against a grouped convolution."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.layers import taps
from manyheads.layers.taps import shifted_sum


@pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 1), (3, 17, 3), (2, 40, 5)])
def test_it_is_a_depthwise_convolution(batch, length, width, monkeypatch) -> None:
    monkeypatch.setattr(taps, "_SPAN_NUMBERS", 50)  # several spans
    x = torch.randn(batch, length + width - 1, 6).double().requires_grad_()
    weight = torch.randn(6, width).double().requires_grad_()
    y = shifted_sum(x, weight)
    expected = torch.nn.functional.conv1d(x.mT, weight[:, None], groups=6).mT
    assert_close(y, expected, 1e-12)
    cotangent = torch.randn_like(y)
    grads = [torch.autograd.grad((t * cotangent).sum(), (x, weight)) for t in (y, expected)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-12)
