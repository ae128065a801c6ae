"""VOLO: published sizes and costs, timm's model, checkpoints, mix-token, fusing."""

from __future__ import annotations

import json

import pytest
import torch

from compare import assert_close
from manyheads.choose.flops import count_flops
from manyheads.models import create_model
from manyheads.models.vision.volo import VOLO, Box, VOLOConfig, mix_box, mix_tokens
from models.vision.small import small

# multiply-adds at the size that the model is made for, both classifiers included
COSTS = {
    "volo_d1": 6_918_741_504, "volo_d2": 14_305_415_168, "volo_d3": 20_732_057_600,
    "volo_d4": 44_262_982_656, "volo_d5": 72_301_181_952, "volo_d1_384": 22_679_560_704,
    "volo_d2_384": 46_063_638_528, "volo_d3_448": 96_128_522_240, "volo_d4_448": 196_840_571_904,
    "volo_d5_448": 314_650_960_896, "volo_d5_512": 424_557_659_136,
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_published_cost(name) -> None:
    model = create_model(name, device="meta").eval()
    x = torch.empty(1, 3, *model.config.sides, device="meta")
    with torch.no_grad():
        counted = count_flops(lambda: model(x)).total
    assert counted / 2 == pytest.approx(COSTS[name], rel=0.01)


def test_names_of_timm() -> None:
    import timm

    for name in timm.list_models("volo*", module="volo"):
        theirs = timm.get_pretrained_cfg(name)
        cfg = create_model(name, device="meta").pretrained_cfg
        for key in ("input_size", "crop_pct", "mean", "std", "first_conv", "classifier"):
            assert tuple(_flat(cfg[key])) == tuple(_flat(getattr(theirs, key))), (name, key)


def _flat(value):
    return value if isinstance(value, (tuple, list)) else (value,)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_equal_to_timm(pool) -> None:
    import timm

    sizes = {"embed_dims": (24, 36, 36, 36), "num_heads": (3, 4, 4, 4), "num_classes": 9}
    theirs = timm.models.volo.VOLO(
        (2, 1, 1, 1), img_size=(64, 96), stem_hidden_dim=8, global_pool=pool, **sizes
    ).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = create_model(
        "volo_d1_224", depths=(2, 1, 1, 1), image_size=(64, 96), stem_dim=8, global_pool=pool,
        weights=theirs.state_dict(), **sizes,
    ).eval()  # fmt: skip
    x = torch.randn(3, 3, 64, 96)
    assert_close(ours(x), theirs(x), 1e-5)
    assert_close(ours.forward_features(x), theirs.forward_features(x), 1e-5)
    for norm in (False, True):
        expected = theirs.forward_intermediates(x, norm=norm, intermediates_only=True)
        maps = ours.forward_intermediates(x, norm=norm, intermediates_only=True)
        for a, b in zip(maps, expected, strict=True):
            assert_close(a, b, 1e-5)
    assert ours.feature_info == theirs.feature_info
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert_close(ours.fuse()(x), theirs(x), 1e-5)
    for model in (ours, theirs):
        model.reset_classifier(0, "")
    assert_close(ours(x), theirs(x), 1e-5)


def test_both_classifiers_are_replaced() -> None:
    model, _ = small("volo")
    model.reset_classifier(4, "avg")
    assert model.head.out_features == model.aux_head.out_features == 4
    assert model.config.global_pool == "avg"
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(4, "max")


@pytest.mark.parametrize("wrap", ["state_dict", "state_dict_ema", None])
def test_released_files(wrap, tmp_path) -> None:
    model, _ = small("volo")
    held = {f"module.{n}": t for n, t in model.to_official().items()}
    torch.save({wrap: held} if wrap else held, tmp_path / "d1.pth.tar")
    again, _ = small("volo")
    again.load_official(tmp_path / "d1.pth.tar")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    small("volo")[0].load_official({wrap: held} if wrap else held)


def test_another_size_and_other_classes() -> None:
    model, _ = small("volo")
    larger, _ = small("volo", image_size=(96, 128))
    larger.load_official(model.to_official())
    assert larger.pos_embed.shape == (1, 6, 8, 32)
    x = torch.randn(1, 3, 96, 128)
    assert_close(larger.eval()(x), model.eval()(x), 1e-5)
    other, _ = small("volo", num_classes=3)
    before = other.aux_head.weight.clone()
    with pytest.warns(UserWarning, match="7 classes apart, the model 3"):
        other.load_official(model.to_official())
    assert torch.equal(other.aux_head.weight, before)
    assert torch.equal(other.norm.weight, model.norm.weight)
    with pytest.raises(ValueError, match="do not fit"):
        small("volo", depths=(1, 1, 2, 1))[0].load_official(model.to_official())


def test_sizes_that_cannot_be() -> None:
    model, _ = small("volo")
    with pytest.raises(ValueError, match=r"width 100 is not a multiple of 16.*96 or 112"):
        model(torch.randn(1, 3, 64, 100))
    with pytest.raises(ValueError, match=r"height 8 .*to 16"):
        model(torch.randn(1, 3, 8, 64))
    with pytest.raises(ValueError, match="image_size"):
        VOLOConfig(image_size=100)
    with pytest.raises(ValueError, match="5 heads"):
        VOLOConfig(num_heads=(5, 12, 12, 12))
    with pytest.raises(ValueError, match="stages"):
        VOLOConfig(depths=(1, 2))


def test_training_returns_tokens_only_when_asked() -> None:
    model, side = small("volo")
    x = torch.randn(3, 3, side, side)
    assert model.train()(x).shape == (3, 7)
    asked, _ = small("volo", token_labels=True)
    out = asked.train()(x)
    assert out.token_logits.shape == (3, 16, 7)
    assert isinstance(out.box, Box)
    assert asked.eval()(x).shape == (3, 7)
    assert asked.forward_train(x).box.area == 0
    without, _ = small("volo_mean")
    with pytest.raises(ValueError, match="no class token"):
        without.forward_train(x)
    with pytest.raises(ValueError, match="token_labels"):
        VOLOConfig(token_labels=True, dense=False)


def test_boxes_are_reproducible_and_on_the_grid() -> None:
    def boxes() -> list[Box]:
        generator = torch.Generator().manual_seed(4)
        return [mix_box((5, 9), generator=generator) for _ in range(300)]

    drawn = boxes()
    assert drawn == boxes()
    assert all(0 <= b.top <= b.bottom <= 5 and 0 <= b.left <= b.right <= 9 for b in drawn)
    assert max(b.bottom for b in drawn) == 5
    assert max(b.right for b in drawn) == 9
    assert len({b.area for b in drawn}) > 10


def test_unmixing_undoes_mixing() -> None:
    x, box = torch.randn(3, 6, 10, 4), Box(1, 0, 3, 4)
    mixed = mix_tokens(x, box, scale=2)
    assert torch.equal(mixed[0, 2:6, :8], x[2, 2:6, :8])
    assert torch.equal(mixed[1], x[1])
    assert torch.equal(mixed[0, :2], x[0, :2])
    assert torch.equal(mix_tokens(mixed, box, scale=2), x)


def test_a_mixed_box_is_checked() -> None:
    model, _ = small("volo")
    x = torch.randn(3, 3, 32, 64)
    out = model.forward_train(x, box=(0, 1, 2, 4))
    assert out.box == (0, 1, 2, 4)
    with pytest.raises(ValueError, match="rows 0 to 4"):
        model.forward_train(x, box=(0, 1, 4, 2))
    generator = torch.Generator().manual_seed(2)
    assert model.forward_train(x, generator=generator).box == mix_box(
        (2, 4), generator=torch.Generator().manual_seed(2)
    )


def test_drop_path_starts_behind_the_outlookers() -> None:
    rates = [[b.drop_path.rate for b in s] for s in _stages(drop_path=0.3)]
    assert rates[0] == [0, 0]
    assert [r for s in rates[1:] for r in s] == pytest.approx([0.12, 0.18, 0.24, 0.3])
    rates = [[b.drop_path.rate for b in s] for s in _stages(drop_path=0.3, outlook_drop_path=True)]
    assert rates[0] == pytest.approx([0, 0.06])


def _stages(**changes):
    model, _ = small("volo", depths=(2, 1, 2, 1), **changes)
    return [s for i, s in enumerate(model.network) if i != 1]


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_the_fused_model_makes_no_keys(qkv_bias) -> None:
    model, side = small("volo", qkv_bias=qkv_bias)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(2, 3, side, side)
    model.eval()
    fused = model.fuse()
    with torch.no_grad():
        assert_close(fused(x), model(x), 1e-5)
        costs = [count_flops(lambda m=m: m(x)).total for m in (model, fused)]
    made, tokens, dim, heads = 2, 17, 32, 4
    keys_and_values = made * 2 * 2 * (2 * tokens * dim**2 + 2 * tokens * dim)
    vectors = made * 2 * 2 * (2 * dim**2 + 2 * heads * tokens * dim)
    assert costs[0] - costs[1] == keys_and_values - vectors


def test_official_arguments() -> None:
    official = {"layers": [1, 1], "embed_dims": [16, 32], "num_heads": [2, 4],
                "mlp_ratios": [3, 3], "downsamples": [True, False],
                "outlook_attention": [True, False]}  # fmt: skip
    config = VOLOConfig.from_official(official | {"post_layers": ["ca", "ca"]})
    assert config.token_labels
    assert config.mix_token
    assert config.class_blocks == 2
    for wrong, match in (
        ({"layerz": 1}, "layerz"),
        ({"patch_size": 16}, "patch_size"),
        ({"return_mean": True}, "return_mean"),
        ({"return_dense": False}, "mix_token"),
        ({"downsamples": [True, True]}, "downsamples"),
    ):
        with pytest.raises(ValueError, match=match):
            VOLOConfig.from_official(official | wrong)


def test_config_survives_json() -> None:
    config = VOLO(VOLOConfig(image_size=(32, 64), depths=(1, 1, 1, 1))).config
    assert VOLOConfig.from_dict(json.loads(config.to_json())) == config
