"""The reconstruction of DualToken-ViT: sizes, cost, images of other sizes."""

from __future__ import annotations

import pytest
import torch

from manyheads.choose.flops import count_flops
from manyheads.models import create_model
from manyheads.models.vision.dualtoken import Merge

# Parameters in millions and multiply-adds at 224 px in units of 10⁹.
SIZES = {
    "dualtoken_vit_tiny": (6.23, 0.53),
    "dualtoken_vit_small": (11.59, 1.00),
    "dualtoken_vit_small_mlp": (12.27, 1.03),
}


def _macs(model, side: int) -> float:
    with torch.no_grad():
        return count_flops(model, torch.empty(1, 3, side, side, device="meta")).total / 2e9


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_calibrated_ones(name) -> None:
    model = create_model(name, device="meta").eval()
    params, macs = SIZES[name]
    assert model.num_parameters() / 1e6 == pytest.approx(params, abs=0.005)
    assert _macs(model, 224) == pytest.approx(macs, rel=0.01)
    assert _macs(model, 448) < 4 * _macs(model, 224)


def test_halvings_follow_the_image() -> None:
    counts = [
        [len(stage[0].token.down) for stage in create_model(
            "dualtoken_vit_tiny", image_size=size, device="meta"
        ).stages]
        for size in (224, (448, 512))
    ]  # fmt: skip
    assert counts == [[1, 0, 0], [2, 1, 0]]


def test_odd_maps_are_padded() -> None:
    merge = Merge(8, 12)
    x, g = torch.randn(2, 5, 7, 8), torch.randn(2, 4, 8)
    image, tokens = merge(x, g)
    assert image.shape == (2, 3, 4, 12)
    assert tokens.shape == (2, 4, 12)
    assert torch.allclose(image[:, :2, :3], merge(x[:, :4, :6], g)[0], atol=1e-6)
    model = create_model("dualtoken_vit_tiny", depths=(1, 1, 1), num_classes=5).eval()
    assert model(torch.randn(1, 3, 107, 61)).shape == (1, 5)


def test_the_head_reads_the_neck() -> None:
    model = create_model("dualtoken_vit_tiny", depths=(1, 1, 1), num_classes=0).eval()
    x = torch.randn(1, 3, 64, 64)
    assert model.forward_features(x).shape == (1, 49 + 4, 192)
    assert model(x).shape == (1, 1280)
    assert (model.num_features, model.head_hidden_size) == (192, 1280)


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="names 2 stages"):
        create_model("dualtoken_vit_tiny", depths=(1, 1))
    with pytest.raises(ValueError, match="must be even"):
        create_model("dualtoken_vit_tiny", embed_dims=(49, 96, 192))
    with pytest.raises(ValueError, match="reconstruction"):
        create_model("dualtoken_vit_tiny", device="meta").to_official()
