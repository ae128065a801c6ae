"""MobileViG: published sizes, its graph in any image, its heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compare import assert_close
from manyheads.choose.flops import FlopCounter
from manyheads.models import create_model
from manyheads.models.vision.mobilevig import MobileViGConfig
from models.vision.small import small

SIZES = {
    "mobilevig_ti": (5_271_074, 662_142_336),
    "mobilevig_s": (7_276_538, 983_688_960),
    "mobilevig_m": (14_075_786, 1_493_425_152),
    "mobilevig_b": (26_868_506, 2_792_944_896),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name) -> None:
    parameters, macs = SIZES[name]
    model = create_model(name, device="meta").eval()
    assert model.num_parameters() == parameters
    with FlopCounter() as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    counter.check()
    assert counter.total / 2 == pytest.approx(macs, rel=0.01)


def test_flops_grow_with_the_places_alone() -> None:
    model = create_model("mobilevig_ti", device="meta").eval()
    counts = []
    for side in (224, 448):
        with FlopCounter() as counter, torch.no_grad():
            model(torch.empty(1, 3, side, side, device="meta"))
        counts.append(counter.total)
    assert counts[1] / counts[0] < 4.0


def test_one_class_and_one_image() -> None:
    model, side = small("mobilevig", num_classes=1)
    assert model.eval()(torch.randn(1, 3, side, side)).shape == (1, 1)


def test_the_smallest_image_has_no_links() -> None:
    model, _ = small("mobilevig")
    assert model.eval()(torch.randn(2, 3, 32, 17)).shape == (2, 7)


def test_several_stages_with_a_graph_keep_the_authors_count() -> None:
    model, side = small("mobilevig_one_head")
    names = model.to_official()
    assert "local_backbone.3.conv.0.weight" in names
    assert "backbone.1.conv.0.weight" in names
    assert "backbone.2.0.fc1.0.weight" in names
    assert model.feature_info[-1]["reduction"] == 32
    again, _ = small("mobilevig_one_head")
    again.load_official(names)
    x = torch.randn(1, 3, side, side)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_the_step_is_felt() -> None:
    model, _ = small("mobilevig")
    other, _ = small("mobilevig", step=3)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 160, 192)
    assert not torch.allclose(model.eval()(x), other.eval()(x))


def test_the_fused_form_has_no_norm_of_batches() -> None:
    model, side = small("mobilevig")
    fused = model.fuse()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(1, 3, side, side)
    assert_close(fused.fuse()(x), model.eval()(x), 1e-5)


def test_a_head_for_other_classes_is_read_from_the_checkpoint() -> None:
    from manyheads.train.vision import fine_tune

    source, _ = small("mobilevig")
    target, _ = small("mobilevig", num_classes=3)
    fine_tune(target, source.to_official(), 3)
    assert target.head.out_features == target.head_dist.out_features == 3
    assert torch.equal(target.stem[0].conv.weight, source.stem[0].conv.weight)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="local_dims names 2"):
        MobileViGConfig(local_dims=(8, 16))
    with pytest.raises(ValueError, match="step 0"):
        MobileViGConfig(step=0)
    weights = create_model("mobilevig_ti", device="meta").to_official()
    with pytest.raises(ValueError, match="do not fit"):
        create_model("mobilevig_s", device="meta", weights=weights)
