"""SOFT backbones: sizes, cost, names, images of other sizes."""

from __future__ import annotations

import pytest
import torch

from manyheads.choose.flops import count_flops
from manyheads.models import create_model
from manyheads.models.vision.soft import SoftBlock

PARAMETERS = {
    "soft_tiny": 13_069_056,
    "soft_small": 38_858_462,
    "soft_small_published": 24_110_092,
    "soft_medium": 45_812_707,
    "soft_large": 64_700_646,
    "soft_huge": 87_108_273,
}
# Counted on the official code at 224 px.
OFFICIAL_MACS = {
    "soft_tiny": 2_220_943_416,
    "soft_small": 7_716_821_776,
    "soft_medium": 9_071_971_628,
    "soft_large": 13_732_324_976,
    "soft_huge": 19_404_185_716,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name) -> None:
    assert create_model(name, device="meta").num_parameters() == PARAMETERS[name]
    norm = name.replace("soft_", "soft_norm_")
    assert create_model(norm, device="meta").num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", OFFICIAL_MACS)
def test_multiply_adds(name) -> None:
    """The official code sums squares by products with ones, and multiplies K1 with Y first."""
    model = create_model(name, device="meta").eval()
    with torch.no_grad():
        macs = count_flops(model, torch.empty(1, 3, 224, 224, device="meta")).total / 2
    c, m, d = model.config, 49, 32
    for depth, heads, (rows, columns) in zip(c.depths[:3], c.num_heads, c.grids, strict=False):
        n = rows * columns
        ones = 2 * n * m * d + 2 * m * m * d
        order = n * m * m - m * m * d
        macs += depth * heads * (ones + order)
    assert macs == pytest.approx(OFFICIAL_MACS[name], rel=1e-4)


def test_a_file_of_either_small_loads() -> None:
    sizes = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1), "image_size": 32}
    released = create_model("soft_small", **sizes)
    published = create_model("soft_small_published", **sizes)
    published.load_official(released.to_official())
    assert published.config == released.config
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(published.eval()(x), released.eval()(x))
    with pytest.raises(ValueError, match="do not fit"):
        create_model("soft_tiny", **sizes).load_official(released.to_official())


def test_dropout_is_of_single_numbers() -> None:
    model = create_model("soft_tiny", depths=(1, 1, 1, 1), drop_path=0.3)
    rates = [m.dropout.p for m in model.modules() if isinstance(m, SoftBlock)]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    assert model.stages[3].blocks[0].drop_path.rate == pytest.approx(0.3)


def test_samples_do_not_depend_on_their_batch() -> None:
    model = create_model("soft_norm_tiny", depths=(1, 1, 1, 1), image_size=64).eval()
    x = torch.randn(3, 3, 64, 96)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)


def test_sizes_and_pooling() -> None:
    model = create_model("soft_tiny", depths=(1, 1, 1, 1), image_size=(64, 96)).eval()
    assert model.stages[3].position.shape == (1, 7, 512)
    assert model(torch.randn(1, 3, 45, 29)).shape == (1, 1000)
    with pytest.raises(ValueError, match="height 28 is below 29"):
        model(torch.randn(1, 3, 28, 64))
    with pytest.raises(ValueError, match="pools by 'token'"):
        model.reset_classifier(3, "avg")
    with pytest.raises(ValueError, match="names 3 stages"):
        create_model("soft_tiny", depths=(1, 1, 1))
    assert model.no_weight_decay() == {"cls_token"}
