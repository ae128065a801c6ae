"""EfficientFormer: published sizes, other sizes of images, timm's weights, dense prediction."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from compare import assert_close
from manyheads.choose.flops import FlopCounter
from manyheads.models import create_model
from manyheads.models.vision.efficientformer import EfficientFormerConfig, TokenBlock
from models.vision.small import small

# Parameters and multiply-adds of matrix products and convolutions at 224 x 224.
SIZES = {
    "efficientformer_l1": (12_289_928, 1_291_284_736),
    "efficientformer_l3": (31_406_000, 3_906_573_312),
    "efficientformer_l7": (82_229_328, 10_119_325_696),
}
TINY = {"depths": (1, 1, 2, 3), "embed_dims": (16, 24, 32, 40), "num_classes": 7}


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for n, b in model.named_buffers():
            if n.endswith("running_mean"):
                b.normal_(std=0.1)
            elif n.endswith("running_var"):
                b.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name) -> None:
    parameters, macs = SIZES[name]
    model = create_model(name, device="meta").eval()
    assert model.num_parameters() == parameters
    with FlopCounter() as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device="meta"))
    counter.check()
    assert counter.total / 2 == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize("token_blocks", [1, 3])
def test_timm_weights_give_timm_logits(token_blocks) -> None:
    from timm.models.efficientformer import EfficientFormer as Theirs

    theirs = Theirs(num_vit=token_blocks, **TINY).eval()
    shake(theirs)
    ours = create_model("efficientformer_l1", token_blocks=token_blocks, **TINY)
    ours.load_official(theirs.state_dict()).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), 1e-5)
        assert_close(ours.forward_features(x), theirs.forward_features(x), 1e-5)
        assert_close(ours.fuse()(x), theirs(x), 1e-5)


def test_timm_names_of_the_published_sizes() -> None:
    for name in SIZES:
        with torch.device("meta"):
            theirs = timm.create_model(name)
        create_model(name, device="meta").load_official(theirs.state_dict())


def test_an_image_size_of_its_own() -> None:
    """Biases of 224 x 224 become those of the model's own size; at 224 they are the same again."""
    small_images = create_model("efficientformer_l1", **TINY)
    shake(small_images)
    weights = small_images.to_official()
    wide = create_model("efficientformer_l1", image_size=(384, 320), weights=weights, **TINY)
    assert wide.stages[3].blocks[2].token_mixer.biases.shape == (8, 12 * 10)
    x = torch.randn(1, 3, 384, 320)
    assert_close(wide.eval()(x), small_images.eval()(x), 1e-5)
    again = create_model("efficientformer_l1", image_size=384, **TINY)
    names = again.to_official()
    assert names["network.6.3.token_mixer.attention_bias_idxs"].shape == (144, 144)
    again.load_official(names)


def test_a_dense_backbone_starts_from_a_classifier() -> None:
    classifier = create_model("efficientformer_l1", **TINY)
    shake(classifier)
    dense = create_model(
        "efficientformer_l1", stage_norms=True, weights=classifier.to_official(), **TINY
    ).eval()
    x = torch.randn(1, 3, 160, 96)
    maps = classifier.eval().forward_intermediates(x, intermediates_only=True)
    for mine, theirs in zip(dense(x)[:3], maps[:3], strict=True):
        assert_close(mine, nn.functional.group_norm(theirs, 1), 1e-5)
    assert dense(x)[3].shape == (1, 40, 5, 3)
    dense(x)[3].sum().backward()
    block = dense.stages[3].blocks[2].token_mixer
    assert block.dense_biases.grad.any()
    assert "biases" not in dict(block.named_parameters())
    dense.load_official(dense.to_official())


def test_two_heads() -> None:
    model, side = small("efficientformer")
    shake(model)
    x = torch.randn(2, 3, side, side)
    assert isinstance(model.train()(x), torch.Tensor)
    model.set_distilled_training()
    logits, for_teacher = model(x)
    assert not torch.allclose(logits, for_teacher)
    model.eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    both = (model.head(pooled) + model.head_dist(pooled)) / 2
    assert torch.equal(model(x), both)
    single, _ = small("efficientformer_one_head")
    with pytest.raises(ValueError, match="distillation=True"):
        single.set_distilled_training()


def test_the_fused_form_has_no_norm_of_batches() -> None:
    model, side = small("efficientformer")
    fused = model.fuse()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = torch.randn(1, 3, side, side)
    exported = torch.export.export(fused, (x,))
    names = [str(n.target) for n in exported.graph.nodes]
    assert not [n for n in names if "batch_norm" in n]
    assert torch.allclose(exported.module()(x), fused(x), atol=1e-6)


def test_tokens_come_once_at_the_end() -> None:
    model = create_model("efficientformer_l3", device="meta")
    kinds = [isinstance(b, TokenBlock) for stage in model.stages for b in stage.blocks]
    assert kinds == [False] * 22 + [True] * 4


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="token_blocks 5"):
        EfficientFormerConfig(token_blocks=5)
    with pytest.raises(ValueError, match="embed_dims names 3"):
        EfficientFormerConfig(embed_dims=(8, 8, 8))
    weights = create_model("efficientformer_l1", **TINY).to_official()
    with pytest.raises(ValueError, match="do not fit"):
        create_model("efficientformer_l1", weights=weights, **(TINY | {"token_blocks": 2}))
