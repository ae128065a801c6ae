"""Backbones in ONNX Runtime, small images."""

from __future__ import annotations

import pytest
import torch

from manyheads.choose import mobile
from manyheads.papers.mobilevig import nearest_differences


def test_ratios_stand_beside_the_phones() -> None:
    found = mobile.compare_onnx(
        names=("mobilevig_ti",), references=("mobilenetv2_140",), side=64, repeats=3
    )
    (row,) = found["rows"]
    seconds = {n: t["median"] for n, t in found["seconds"].items()}
    assert row["here"] == seconds["mobilevig_ti"] / seconds["mobilenetv2_140"]
    assert row["phones"] == {"iPhone 13 mini": pytest.approx(0.78 / 1.02)}


def test_nearest_differences_look_at_the_nearest() -> None:
    x = torch.randn(2, 5, 4, 3)
    out = nearest_differences(x, neighbours=12)
    flat = x.flatten(2)
    expected = (flat[:, :, :, None] - flat[:, :, None]).amax(3).reshape(x.shape)
    assert torch.allclose(out, expected)
    assert not nearest_differences(x, neighbours=1).any()
