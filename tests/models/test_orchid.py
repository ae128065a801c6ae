"""Orchid encoders of tokens and images: sizes, padding, heads, saving."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close, relative_error
from manyheads.layers.block_linear import BlockLinear
from manyheads.models import create_model, get_variant, load_model
from manyheads.models.language.orchid import (
    OrchidEncoder,
    OrchidEncoderConfig,
    OrchidForClassification,
    OrchidForMaskedLM,
)
from manyheads.models.vision.orchid import OrchidVision, OrchidVisionConfig

SIZES = {"vocab_size": 31, "embed_dim": 24, "num_layers": 2, "mlp_width": 48, "max_length": 20}
LENGTHS = (11, 20, 7)


def tiny(model=OrchidForMaskedLM, **options):
    return model(OrchidEncoderConfig(**(SIZES | options))).eval().double()


def vision(**options) -> OrchidVision:
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "mlp_width": 48}
    return OrchidVision(OrchidVisionConfig(**(sizes | {"num_classes": 5} | options))).eval()


def test_sizes_come_to_the_published_millions() -> None:
    for name, exact, published in (
        ("orchid_bert_base", 77_127_738, 77),
        ("orchid-bert-large", 253_889_850, 254),
        ("orchid_vit_b", 47_412_040, 48),
    ):
        count = create_model(name, device="meta").num_parameters()
        assert count == exact
        assert abs(count / 1e6 - published) < 1, name
        assert get_variant(name).slug == "orchid"


@pytest.mark.parametrize("blocks", [1, 4])
def test_block_linear_is_a_dense_map_with_zeros(blocks) -> None:
    layer = BlockLinear(8, 12, blocks=blocks).double()
    torch.nn.init.normal_(layer.bias)
    dense = torch.block_diag(*layer.weight)
    x = torch.randn(2, 3, 8).double()
    assert_close(layer(x), x @ dense.mT + layer.bias, 1e-12)
    with pytest.raises(ValueError, match="out_features 10"):
        BlockLinear(8, 10, blocks=4)


@pytest.mark.parametrize("pool", ["first", "mean"])
@pytest.mark.parametrize("gated", [True, False])
def test_padded_packed_and_alone_agree(pool, gated) -> None:
    model = tiny(OrchidForClassification, pool=pool, gated_mlp=gated, num_classes=3)
    rows = [torch.randint(1, 31, (1, n)) for n in LENGTHS]
    alone = torch.cat([model(r) for r in rows])
    tokens = torch.zeros(3, 25, dtype=torch.long)
    for i, (row, start) in enumerate(zip(rows, (14, 0, 5), strict=True)):
        tokens[i, start : start + row.shape[1]] = row[0]
    assert_close(model(tokens), alone, 1e-10)
    mask = tokens != 0
    assert_close(model(tokens.masked_fill(~mask, 7), mask=mask), alone, 1e-10)
    borders = torch.tensor([0, *LENGTHS]).cumsum(0)
    assert_close(model(torch.cat(rows, 1), cu_seqlens=borders), alone, 1e-10)


def test_every_weight_learns_and_every_token_is_seen() -> None:
    model = tiny(dropout=0.0, drop_path=0.0).train()
    tokens = torch.randint(1, 31, (2, 20))
    segments = (torch.arange(20) > 9).long().expand(2, -1)
    logits = model(tokens, segments=segments)
    assert logits.shape == (2, 20, 31)
    logits.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    other = tokens.clone()
    other[:, -1] = tokens[:, -1] % 30 + 1
    assert (model(other, segments=segments) - logits)[:, 0].abs().min() > 0
    assert relative_error(model(tokens), logits) > 1e-6, "segments matter"


def test_models_save_and_compile(tmp_path) -> None:
    tokens = torch.randint(1, 31, (2, 17))
    for kind in (OrchidEncoder, OrchidForMaskedLM, OrchidForClassification):
        model = tiny(kind, padding_id=None).float()
        model.save(tmp_path)
        again = load_model(tmp_path).eval()
        assert type(again) is kind
        assert torch.equal(again(tokens), model(tokens))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens), model(tokens), 1e-5)
    picture = vision()
    picture.save(tmp_path)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_model(tmp_path).eval()(image), picture(image))
    with pytest.raises(ValueError, match="no official checkpoints"):
        model.to_official()
    with pytest.raises(ValueError, match="no official checkpoints"):
        picture.to_official()


def test_options_and_errors() -> None:
    dense = tiny(mlp_blocks=1, mixer={"conditioning": "type2"}, segments=0)
    tokens = torch.randint(1, 31, (1, 9))
    assert dense(tokens).shape == (1, 9, 31)
    with pytest.raises(ValueError, match="segments=0"):
        dense(tokens, segments=tokens)
    with pytest.raises(ValueError, match="max_length 20"):
        dense(torch.randint(1, 31, (1, 21)))
    with pytest.raises(ValueError, match="max_length 20"):
        dense(torch.randint(1, 31, (1, 30)), cu_seqlens=torch.tensor([0, 21, 30]))
    with pytest.raises(ValueError, match="padding_id"):
        OrchidEncoderConfig(padding_id=40000)
    with pytest.raises(ValueError, match="pool"):
        OrchidEncoderConfig(pool="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="conditioning"):
        OrchidEncoderConfig(mixer={"conditionning": "type2"})
    with pytest.raises(ValueError, match="no causal form"):
        OrchidEncoderConfig(mixer={"is_causal": True})
    with pytest.raises(ValueError, match="patch_size"):
        OrchidVisionConfig(image_size=33)


def test_images_have_timms_surface() -> None:
    model = vision()
    image = torch.randn(2, 3, 32, 32)
    features = model.forward_features(image)
    assert features.shape == (2, 16, 24)
    assert_close(model(image), model.forward_head(features), 1e-6)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)
    last, found = model.forward_intermediates(image, [0, -1], norm=True)
    assert [f.shape for f in found] == [(2, 24, 4, 4)] * 2
    assert_close(last, features, 1e-6)
    assert_close(found[1].flatten(2).mT, features, 1e-6)
    (only,) = model.forward_intermediates(
        image, [1], output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    assert only.shape == (2, 16, 24)
    assert len(model.feature_info) == 3
    model.reset_classifier(0)
    assert model(image).shape == (2, 24)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7)
    for wrong, message in (({"indices": [3]}, "stage 3"), ({"output_fmt": "NCWH"}, "NLC")):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(image, **wrong)


def test_images_of_other_sizes() -> None:
    model = vision()
    assert model(torch.randn(1, 3, 30, 17)).shape == (1, 5)
    with pytest.raises(ValueError, match="max_length"):
        model(torch.randn(1, 3, 40, 32))
    assert vision(max_length=64)(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_checkpointing_changes_no_gradient() -> None:
    model, image = vision(drop_path=0.0).train(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
