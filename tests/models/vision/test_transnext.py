"""TransNeXt: published sizes and costs, official names, resolutions."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.attention.grid import build_mixer
from manyheads.choose.flops import count_flops
from manyheads.models import create_model, get_variant, list_models
from manyheads.models.vision.transnext import ConvGLU, TransNeXtConfig
from models.vision.small import small

PUBLISHED = {
    "transnext_micro": (12_809_304, 224, 2_648_551_168),
    "transnext_tiny": (28_258_960, 224, 5_711_069_568),
    "transnext_small": (49_741_564, 224, 10_290_562_816),
    "transnext_base": (89_721_496, 224, 18_299_881_472),
    "transnext_small_384": (49_741_564, 384, 32_017_962_496),
    "transnext_base_384": (89_721_496, 384, 56_185_428_992),
    "transnext_micro_aaaa": (13_114_008, 256, 3_325_754_368),
}


def test_all_published_variants_are_here() -> None:
    assert set(list_models("transnext*")) == set(PUBLISHED)
    for alias, name in (
        ("transnext_tiny_224_1k", "transnext_tiny"),
        ("transnext-base-384-1k-ft-1k", "transnext_base_384"),
        ("transnext_micro_AAAA", "transnext_micro_aaaa"),
    ):
        assert get_variant(alias).name == name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_exact_and_macs_within_a_percent(name) -> None:
    parameters, side, macs = PUBLISHED[name]
    # The definition: products of shifts are elementwise, which the counter leaves out.
    model = create_model(name, device="meta", implementation="reference").eval()
    assert model.num_parameters() == parameters
    with torch.no_grad():
        counted = count_flops(model, torch.empty(1, 3, side, side, device="meta")).total / 2
    assert abs(counted - macs) < 0.002 * macs
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    assert model.pretrained_cfg["crop_pct"] == (1.0 if side == 384 else 0.875)


@pytest.mark.parametrize("sides", [(138, 101), (64, 33), (32, 20)])
def test_images_of_any_size(sides) -> None:
    for name in ("transnext", "transnext_extrapolation"):
        model, _ = small(name)
        maps = model.eval().forward_intermediates(
            torch.randn(2, 3, *sides), intermediates_only=True
        )
        expected = [tuple(-(-s // 2 ** (i + 2)) for s in sides) for i in range(4)]
        assert [tuple(m.shape[2:]) for m in maps] == expected
        assert all(m.isfinite().all() for m in maps)


def test_modes_of_position_agree_at_the_size_they_are_made_for() -> None:
    models = [small("transnext", positions=p)[0].eval() for p in ("interpolation", "extrapolation")]
    models[1].load_state_dict(models[0].state_dict())
    home, away = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 138)
    assert torch.equal(models[0](home), models[1](home))
    assert not torch.allclose(models[0](away), models[1](away), atol=1e-7)
    models[0].set_input_size((96, 138))
    assert models[0].config.start == 64
    assert torch.equal(models[0](away), models[1](away))


def test_implementations_agree_in_a_model() -> None:
    models = [
        small("transnext", implementation=i)[0].double().eval() for i in ("shift", "reference")
    ]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 3, 75, 64).double()
    assert_close(models[0](x), models[1](x), 1e-6)


def test_the_fused_model_keeps_each_size_apart() -> None:
    model, side = small("transnext")
    fused = model.eval().fuse()
    for size in (side, side + 30, side):
        x = torch.randn(1, 3, size, size)
        assert_close(fused(x), model(x), 1e-5)
    attention = fused.stages[0].blocks[0].attn
    assert len(attention._kept) == 2
    assert model.stages[0].blocks[0].attn._kept is None


@pytest.mark.parametrize("name", ["transnext", "transnext_extrapolation", "transnext_linear"])
def test_the_fused_model_without_gradients(name) -> None:
    """Packed products run then alone; weights keep their names and shapes."""
    model, side = small(name)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        fused = model.eval().fuse()
        shapes = [{n: t.shape for n, t in m.state_dict().items()} for m in (model, fused)]
        assert shapes[0] == shapes[1]
        again = small(name)[0].eval().fuse()
        again.load_state_dict(fused.state_dict())
        for rows in (side, side + 27):
            x = torch.randn(3, 3, rows, side)
            for other in (fused, fused.fuse(), again):
                assert_close(other(x), model(x), 1e-5)
        x = torch.randn(1, 3, side, side)
        assert_close(torch.export.export(fused, (x,)).module()(x), model(x), 1e-5)


def test_official_names_go_both_ways(tmp_path) -> None:
    model, side = small("transnext")
    official = model.to_official()
    assert "block3.1.attn.learnable_tokens" in official
    assert "block1.0.mlp.dwconv.dwconv.weight" in official
    torch.save({"model": official}, tmp_path / "transnext_tiny_224_1k.pth")
    again = small("transnext", weights=tmp_path / "transnext_tiny_224_1k.pth")[0]
    x = torch.randn(1, 3, side, side)
    assert torch.equal(again.eval()(x), model.eval()(x))
    for message, changes in (
        ("this variant needs", {"embed_dims": (16, 12, 16, 24)}),
        ("unexpected", {"depths": (1, 1, 1, 1)}),
        ("missing", {"depths": (1, 1, 3, 1)}),
    ):
        with pytest.raises(ValueError, match=message):
            small("transnext", **changes)[0].load_official(official)


def test_decay_and_layer_groups() -> None:
    model, _ = small("transnext")
    spared = model.no_weight_decay()
    for part in ("query_embedding", "relative_pos_bias_local", "cpb_fc1.weight", "temperature"):
        assert f"stages.0.blocks.0.attn.{part}" in spared
    assert "stages.0.blocks.0.attn.learnable_tokens" not in spared
    assert model.group_matcher(coarse=True)["stem"].startswith("^stages")


def test_first_values() -> None:
    model, _ = small("transnext")
    attention = model.stages[0].blocks[0].attn
    assert_close(attention.scale(), torch.full((1, 1, 1), 1 / 0.24), 1e-6)
    assert attention.relative_pos_bias_local.std() < 0.001
    assert not attention.learnable_bias.any()
    depthwise = model.stages[0].blocks[0].mlp.dwconv.weight
    assert abs(depthwise.std() - (2 / 9) ** 0.5) < 0.15


def test_conv_glu_width_and_errors() -> None:
    assert ConvGLU(16, 50).fc2.in_features == 33
    for message, changes in (
        ("pretrain_size 32 leaves the last stage", {"pretrain_size": 32}),
        ("heads|num_heads names 3 stages", {"num_heads": (1, 2, 3)}),
        ("dim 72 is not a multiple", {"num_heads": (5, 6, 12, 24)}),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("transnext_tiny", device="meta", **changes)
    model = small("transnext_linear")[0]
    with pytest.raises(ValueError, match="fixed_pool_size 3 must be below the map's shorter side"):
        model(torch.randn(1, 3, 32, 64))
    assert TransNeXtConfig.from_json(TransNeXtConfig().to_json()) == TransNeXtConfig()


def test_a_mixer_of_a_metaformer() -> None:
    model = create_model(
        "poolformer_s12", mixers=["pool", "pool", "aggregated", "attention"], num_classes=5
    )
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert build_mixer("aggregated", 24, num_heads=2, grid=(28, 56)).sr_ratio == 4
