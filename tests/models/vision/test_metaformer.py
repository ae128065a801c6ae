"""MetaFormer: published sizes of every variant."""

from __future__ import annotations

import pytest
import torch

from manyheads.choose.flops import count_flops
from manyheads.models import create_model, list_models

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
