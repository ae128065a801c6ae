"""Our backbones through timm's door, and timm's own weights through ours."""

from __future__ import annotations

import pytest
import timm
import torch

from manyheads.bridges import timm as bridge
from manyheads.models import create_model

TINY = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 40)}


def test_models_are_listed_and_built() -> None:
    assert "manyheads_poolformer_s12" in timm.list_models("manyheads_*")
    assert "metaformer_id_s12" in timm.list_models("metaformer_id*")
    model = timm.create_model(
        "manyheads_poolformer_s12", in_chans=5, num_classes=3, drop_path_rate=0.3, **TINY
    )
    assert model.config.drop_path == 0.3
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 3)


def test_entering_twice_changes_nothing() -> None:
    assert bridge.register() == []


def test_timm_keeps_its_own_models() -> None:
    assert type(timm.create_model("poolformer_s12")).__module__.startswith("timm")


def test_features_only_and_data_config() -> None:
    model = timm.create_model(
        "manyheads_poolformer_s12", features_only=True, out_indices=(1, 3), **TINY
    )
    assert model.feature_info.channels() == [24, 40]
    whole = timm.create_model("manyheads_poolformer_s12", **TINY)
    config = timm.data.resolve_data_config({}, model=whole)
    assert config["input_size"] == (3, 224, 224)
    assert config["crop_pct"] == 0.9


def test_nothing_is_downloaded(tmp_path) -> None:
    with pytest.raises(ValueError, match="downloads nothing"):
        timm.create_model("manyheads_poolformer_s12", pretrained=True)
    source = create_model("poolformer_s12", **TINY)
    torch.save(source.to_official(), tmp_path / "w.pth.tar")
    overlay = {"file": str(tmp_path / "w.pth.tar")}
    model = timm.create_model(
        "manyheads_poolformer_s12", pretrained=True, pretrained_cfg_overlay=overlay, **TINY
    )
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), source.eval()(x))


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="global_pool 'max'"):
        timm.create_model("manyheads_poolformer_s12", global_pool="max", **TINY)
    with pytest.raises(ValueError, match="no option 'depth'"):
        timm.create_model("manyheads_poolformer_s12", depth=3)


@pytest.mark.parametrize("name", ["poolformer_s12"])
def test_timm_weights_give_timm_logits(name) -> None:
    """timm averages before its last norm; with that order the same weights give the same logits."""
    theirs = timm.create_model(name, num_classes=10).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours = create_model(name, weights=theirs.state_dict(), num_classes=10, head_norm="timm").eval()
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-4)


def test_backbones_with_two_heads() -> None:
    sizes = {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40)}
    model = timm.create_model(
        "manyheads_efficientformer_l1", img_size=96, num_classes=3, drop_path_rate=0.1, **sizes
    )
    assert model.config.grid == (3, 3)
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    assert type(timm.create_model("efficientformer_l1")).__module__.startswith("timm")
    assert "mobilevig_ti" in timm.list_models("mobilevig*")


@pytest.mark.parametrize("name", ["manyheads_poolformer_s12", "manyheads_efficientformer_l1"])
def test_a_step_of_timms_training_loop(name) -> None:
    """Model, optimiser, schedule, mixup, loss and averaged weights as timm's train script makes
    them."""
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    sizes = {"depths": (1, 1, 1, 2), "embed_dims": (16, 24, 32, 40), "img_size": 64}
    model = timm.create_model(name, pretrained=False, num_classes=5, drop_path_rate=0.1, **sizes)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75
    )
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=3, warmup_epochs=1)
    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    averaged = ModelEmaV3(model, decay=0.9)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for epoch in range(2):
        schedule.step(epoch + 1)
        images, target = mixup(torch.randn(8, 3, 64, 64), torch.randint(5, (8,)))
        optimizer.zero_grad()
        SoftTargetCrossEntropy()(model.train()(images), target).backward()
        optimizer.step()
        averaged.update(model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names
    groups = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(groups) == len(names)
    assert len({g["lr_scale"] for g in optimizer.param_groups}) > 3
    assert averaged(torch.randn(1, 3, 64, 64)).shape == (1, 5)
