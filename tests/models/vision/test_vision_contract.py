"""What timm's users expect of a backbone, of every family."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from manyheads.models import create_model, get_variant, list_models
from manyheads.models.vision.base import VisionModel
from models.vision.small import SMALL, small

VARIANTS = [n for n in list_models() if issubclass(get_variant(n).model, VisionModel)]


def _images(side: int, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, side, side)


def _heads(model: VisionModel) -> list[tuple[str, nn.Module]]:
    """Return names and modules of the classifiers; some models have two, VOLO gives the first."""
    names, heads = model.pretrained_cfg["classifier"], model.get_classifier()
    names = (names,) if isinstance(names, str) else names
    heads = heads if isinstance(heads, tuple) else (heads,)
    return list(zip(names, heads, strict=False))


def test_every_family_is_among_the_small_ones() -> None:
    families = {get_variant(v).model for v, _, _ in SMALL.values()}
    assert families == {get_variant(n).model for n in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes_build_without_memory(name) -> None:
    model = create_model(name, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert model.num_parameters() > 1_000_000
    cfg = model.pretrained_cfg
    for classifier, head in _heads(model):
        assert model.get_submodule(classifier) is head
    assert any(n.startswith(cfg["first_conv"]) for n, _ in model.named_parameters())


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_head_of_features(name) -> None:
    model, side = small(name)
    model.eval()
    x = _images(side)
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    assert model(x).shape == (2, 7)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_gradient(name) -> None:
    model, side = small(name)
    model(_images(side)).square().sum().backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    silent = [n for n, p in trained if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_are_the_stages(name) -> None:
    model, side = small(name)
    model.eval()
    x = _images(side)
    last, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for one, info in zip(maps, model.feature_info, strict=True):
        cells = -(-side // info["reduction"])
        assert one.shape == (2, info["num_chs"], cells, cells)
        model.get_submodule(info["module"])
    assert torch.equal(model.forward_head(last), model(x))
    some = model.forward_intermediates(x, [-1, 1], stop_early=True, intermediates_only=True)
    assert torch.equal(some[0], maps[1])
    assert torch.equal(some[1], maps[-1])
    (nhwc,) = model.forward_intermediates(x, 1, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(nhwc.permute(0, 3, 1, 2), maps[-1])
    for wrong in ([9], [-9], []):
        with pytest.raises(ValueError, match="stage"):
            model.forward_intermediates(x, wrong)


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name) -> None:
    variant, overrides, side = SMALL[name]
    model = create_model(variant, features_only=True, out_indices=(0, 2), **overrides).eval()
    maps = model(_images(side))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [side // m.shape[2] for m in maps] == model.feature_info.reduction()
    with pytest.raises(ValueError, match="stage 7"):
        create_model(variant, features_only=True, out_indices=(7,), **overrides)


@pytest.mark.parametrize("name", SMALL)
def test_the_classifier_can_be_changed(name) -> None:
    model, side = small(name)
    model.eval()
    x = _images(side)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    assert model.num_classes == model.config.num_classes == 5
    model.reset_classifier(0)
    assert all(isinstance(head, nn.Identity) for _, head in _heads(model))
    assert model(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    with pytest.raises(ValueError, match="num_classes -1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_gradient(name) -> None:
    model, side = small(name, drop_path=0.0)
    x, gradients = _images(side), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_channels(name) -> None:
    model, side = small(name, in_channels=5)
    assert model.eval()(_images(side, 5)).shape == (2, 7)
    with pytest.raises(ValueError, match="3 channels"):
        model(_images(side, 3))
    with pytest.raises(ValueError, match="axes"):
        model(torch.randn(5, side, side))


@pytest.mark.parametrize("name", SMALL)
def test_another_size_of_image(name) -> None:
    model, side = small(name)
    x = torch.randn(1, 3, side + 32, 2 * side)
    assert model.eval()(x).shape == (1, 7)


@pytest.mark.parametrize("name", SMALL)
def test_compiles_whole(name) -> None:
    model, side = small(name)
    model.eval()
    x = _images(side)
    torch._dynamo.reset()  # its limit counts compilations of a module's code, whatever the model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_exports(name) -> None:
    model, side = small(name)
    model.eval()
    x = _images(side)
    exported = torch.export.export(model, (x,))
    assert torch.allclose(exported.module()(x), model(x), atol=1e-5)


# Mechanisms of the hall are operators of ours, for which ONNX has no name.
OWN_OPERATORS = {"metaformer_hall", "flowformer", "orchid"}


@pytest.mark.parametrize("name", [n for n in SMALL if n not in OWN_OPERATORS])
def test_onnx_runtime_agrees(name, tmp_path) -> None:
    import onnxruntime

    model, side = small(name)
    model.eval()
    x = _images(side)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-4)


def test_nothing_to_fuse_is_said() -> None:
    with pytest.raises(ValueError, match="OrchidVision has no fused form"):
        small("orchid")[0].fuse()


@pytest.mark.parametrize("name", [n for n in SMALL if n != "orchid"])
def test_the_fused_form_is_equal(name) -> None:
    model, side = small(name)
    _shake(model)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    x = _images(side)
    fused = model.fuse()
    assert torch.allclose(fused(x), model(x), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_saves_and_loads(name, tmp_path) -> None:
    model, side = small(name)
    _shake(model)
    model.save(tmp_path)
    again = type(model).load(tmp_path)
    x = _images(side)
    assert torch.equal(again.eval()(x), model.eval()(x))


def _shake(model: nn.Module) -> None:
    """Move every number off its first value, so that no part of a model is still idle."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for n, b in model.named_buffers():
            if n.endswith("running_mean"):
                b.normal_(std=0.1)
            elif n.endswith("running_var"):
                b.uniform_(0.5, 1.5)
