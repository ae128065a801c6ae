"""MetaFormer: published sizes of every variant, and the fused form."""

from __future__ import annotations

import copy

import pytest
import torch

from compare import assert_close
from manyheads.choose.flops import count_flops
from manyheads.models import create_model, list_models
from models.vision.small import small

# Parameters, and multiply-adds in 10⁹ of matrix products and convolutions at 224 px.
SIZES = {
    "poolformer_s12": (11_915_176, 1.812),
    "poolformer_s24": (21_388_968, 3.392),
    "poolformer_s36": (30_862_760, 4.972),
    "poolformer_m36": (56_172_520, 8.759),
    "poolformer_m48": (73_473_448, 11.533),
    "metaformer_id_s12": (11_915_176, 1.812),
    "metaformer_pppf_s12_224": (11_919_978, 1.815),
    "metaformer_ppff_s12_224": (12_150_474, 1.888),
    "metaformer_pppa_s12_224": (14_038_440, 1.920),
    "metaformer_ppaa_s12_224": (16_535_592, 2.549),
}


def test_every_variant_is_counted() -> None:
    assert set(SIZES) == {*list_models("poolformer*"), *list_models("metaformer*")}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name) -> None:
    parameters, products = SIZES[name]
    model = create_model(name, device="meta").eval()
    assert model.num_parameters() == parameters
    with torch.no_grad():
        counted = count_flops(model, torch.empty(1, 3, 224, 224, device="meta")).total / 2
    assert counted == pytest.approx(products * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", ["poolformer", "metaformer_ppaa", "metaformer_hall"])
@pytest.mark.parametrize("layer_scale", [0.7, None])
def test_the_fused_model_without_gradients(name, layer_scale) -> None:
    """Kernels and packed products run then alone; the copy of a copy and its weights are equal."""
    model, side = small(name, layer_scale=layer_scale)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        fused = model.eval().fuse()
        again = model.fuse()
        again.load_state_dict(fused.state_dict())
        for rows in (side, side if name == "metaformer_hall" else side + 31):
            x = torch.randn(3, 3, rows, side)
            for other in (fused, fused.fuse(), again):
                assert_close(other(x), model(x), 1e-5)
            maps = zip(
                fused.forward_intermediates(x, intermediates_only=True),
                model.forward_intermediates(x, intermediates_only=True),
                strict=True,
            )
            for a, b in maps:
                assert_close(a, b, 1e-5)
    shapes = [
        {n: t.shape for n, t in m.state_dict().items() if "layer_scale" not in n}
        for m in (model, fused)
    ]
    assert shapes[0] == shapes[1]


def test_the_fused_model_is_exported_and_bears_other_precisions() -> None:
    model, side = small("poolformer")
    fused, x = model.eval().fuse(), torch.randn(2, 3, side, side)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,)).module()
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        for form in (exported, compiled):
            assert_close(form(x), model(x), 1e-5)
        assert_close(copy.deepcopy(fused).double()(x.double()), model.double()(x.double()), 1e-5)
    leaf = x.clone().requires_grad_()
    fused(leaf).sum().backward()
    assert leaf.grad is not None
