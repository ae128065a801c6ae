"""The Flowformer vision backbone: published size, image sizes, timm's surface."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compare import assert_close
from manyheads.choose.flops import count_flops
from manyheads.models import create_model
from manyheads.models.base import load_model
from manyheads.models.vision.flowformer import FlowformerVision, FlowformerVisionConfig


def small(**changes) -> FlowformerVision:
    options = {
        "image_size": 64, "num_classes": 7, "embed_dims": (12, 24, 24, 36), "depths": (1, 1, 2, 1),
        "layer_scale": 1.0,
    }  # fmt: skip
    return FlowformerVision(FlowformerVisionConfig(**(options | changes)))


def test_published_size() -> None:
    model = create_model("vision_96_19layers", device="meta")
    assert model.num_parameters() == 43_311_304
    assert sum(len(s) for s in model.stages) == 19
    assert [f["reduction"] for f in model.feature_info] == [4, 8, 16, 32]


def test_published_cost() -> None:
    """6.87 G multiply-adds at 224, counted from the layer sizes in the original's description."""
    model = create_model("vision_96_19layers").eval()
    with torch.no_grad():
        flops = count_flops(lambda: model(torch.randn(1, 3, 224, 224))).total
    assert flops / 2 == pytest.approx(6.87e9, rel=0.01)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (70, 45), (32, 32), (5, 7)])
def test_any_image_size_runs(size) -> None:
    model = small().eval()
    x = torch.randn(3, 3, *size)
    features = model.forward_features(x)
    cells = list(size)
    for side in (4, 2, 2, 2):
        cells = [-(-c // side) for c in cells]
    assert features.shape == (3, *cells, 36)
    assert_close(features[1:2], model.forward_features(x[1:2]), 1e-5)


def test_sides_that_do_not_divide_are_padded_with_zeros() -> None:
    model = small().eval()
    x = torch.randn(1, 3, 61, 64)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 3))
    assert torch.equal(model(x), model(padded))


def test_layer_scale_and_drop_path_stand_where_they_stood() -> None:
    model = small(layer_scale=1e-5, drop_path=0.2)
    gammas = {k: p for k, p in model.named_parameters() if "gamma" in k}
    assert len(gammas) == 5
    assert all((p == 1e-5).all() for p in gammas.values())
    rates = [m.rate for m in model.modules() if hasattr(m, "rate")]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_every_parameter_gets_a_gradient_also_when_checkpointed() -> None:
    model, x = small(drop_path=0.0), torch.randn(2, 3, 64, 64)
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().sum() > 0, name
        assert_close(grads[1][name], grad, 1e-4, name)


def test_intermediates() -> None:
    model, x = small().eval(), torch.randn(2, 3, 64, 96)
    final, all_ = model.forward_intermediates(x)
    assert [tuple(t.shape) for t in all_] == [
        (2, f["num_chs"], 64 // f["reduction"], 96 // f["reduction"]) for f in model.feature_info
    ]
    assert torch.equal(final, model.forward_features(x))
    (last,) = model.forward_intermediates(
        x, [-1], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    assert torch.equal(last, final)
    early = model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(early, all_, strict=False))
    assert len(model.forward_intermediates(x, 2, intermediates_only=True)) == 2
    for wrong in ([4], [-5]):
        with pytest.raises(ValueError, match="give -4 to 3"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NCWH")


def test_heads() -> None:
    model, x = small().eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 36)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(11)
    assert model(x).shape == (2, 11)
    assert model.config.num_classes == 11
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    assert isinstance(model.head, nn.Identity)


def test_official_weights_of_another_image_size(tmp_path) -> None:
    """The same size is a no-op; positions are interpolated once for another one."""
    model, x = small().eval(), torch.randn(1, 3, 64, 64)
    same = small().load_official(model.to_official()).eval()
    assert torch.equal(same(x), model(x))
    larger = small(image_size=96).load_official(model.to_official()).eval()
    assert larger.pos_embed.shape == (1, 24 * 24, 12)
    big = torch.randn(1, 3, 96, 96)
    assert_close(larger(big), model(big), 1e-5)
    model.save(tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(x), model(x))


def test_official_options() -> None:
    config = FlowformerVisionConfig.from_official({"img_size": 64, "init_values": 1e-4})
    assert config.embed_dims == (64, 128, 256, 512)
    assert config.depths == (2, 2, 10, 4)
    assert (config.image_size, config.layer_scale) == (64, 1e-4)
    with pytest.raises(ValueError, match="did you mean 'img_size'"):
        FlowformerVisionConfig.from_official({"image_size": 64})
    with pytest.raises(ValueError, match="one entry a stage"):
        FlowformerVisionConfig(depths=(1, 1))
    with pytest.raises(ValueError, match="image_size 65"):
        FlowformerVisionConfig(image_size=65)


def test_it_compiles() -> None:
    model, x = small().eval(), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), model(x), 1e-5)
