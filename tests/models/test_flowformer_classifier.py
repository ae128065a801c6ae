"""The Flowformer classifier of time series."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.models.base import load_model
from manyheads.models.language.flowformer_classifier import (
    FlowformerClassifier,
    FlowformerClassifierConfig,
)


def small(**changes) -> FlowformerClassifier:
    options = {"in_channels": 5, "num_classes": 3, "embed_dim": 24, "num_heads": 4, "num_layers": 2}
    return FlowformerClassifier(FlowformerClassifierConfig(**(options | changes)))


def test_padding_packing_and_batching_change_nothing() -> None:
    model = small().double().eval()
    x = torch.randn(3, 63, 5).double()
    mask = torch.ones(3, 63, dtype=torch.bool)
    mask[0, :20] = mask[1, 40:] = mask[2, 10:15] = False
    logits = model(x, mask=mask)
    alone = torch.cat([model(x[i : i + 1, mask[i]]) for i in range(3)])
    assert_close(logits, alone, 1e-9)
    changed = torch.where(mask[..., None], x, torch.randn_like(x) * 100)
    assert_close(model(changed, mask=mask), logits, 1e-9)
    packed = torch.cat([x[i, mask[i]] for i in range(3)])[None]
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert_close(model(packed, cu_seqlens=borders), logits, 1e-9)


def test_a_row_without_a_real_time_is_finite() -> None:
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1] = False
    assert torch.isfinite(small().eval()(torch.randn(2, 9, 5), mask=mask)).all()


def test_any_length_runs_and_order_matters() -> None:
    model = small().eval()
    x = torch.randn(1, 500, 5)
    assert model(x).shape == (1, 3)
    assert not torch.allclose(model(x), model(x.flip(1)), atol=1e-4)


def test_it_learns_and_is_saved(tmp_path) -> None:
    """Which channel carries the wave."""
    generator = torch.Generator().manual_seed(0)
    model = small(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(16, 32, 5, generator=generator)
        label = torch.randint(3, (16,), generator=generator)
        x[torch.arange(16), :, label] += 2 * torch.sin(torch.arange(32) * 0.7)
        return x, label

    for _ in range(80):
        x, label = batch()
        loss = torch.nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    x, label = batch()
    assert (model(x).argmax(-1) == label).float().mean() > 0.9
    model.save(tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(x), model(x))
    with pytest.raises(ValueError, match="no official checkpoints"):
        model.to_official()
