"""SLA modules of published size, by name."""

from __future__ import annotations

import pytest
import torch

from manyheads.models import create_model, list_models, load_model


@pytest.mark.parametrize("name", list_models("sla*wan2_1_1_3b"))
def test_a_module_of_wan_is_built_saved_and_loaded(name, tmp_path) -> None:
    model = create_model(name, block_q=16, block_k=16, topk=0.3)
    assert model.num_parameters() == 128 * 128 + 128
    torch.nn.init.normal_(model.proj_l.weight)
    model.save(tmp_path)
    q, k, v = (torch.randn(1, 2, 50, 128) for _ in range(3))
    again = load_model(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(q, k, v), model(q, k, v))


def test_the_variants_stand_in_the_table() -> None:
    found = {create_model(n, device="meta").config.variant for n in list_models("sla*wan2_1*")}
    assert found == {"main", "sla1", "paper"}
