"""TransNormer for long sequences: the six rows, norms, padding, pairs, training."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compare import assert_close, relative_error
from manyheads.attention import DiagAttention
from manyheads.models import create_model, list_models
from manyheads.models.language.transnormer_lra import (
    TransNormerLRA,
    TransNormerLRAConfig,
    lra_diag_config,
)

TASKS = {
    "cifar": (12, 128, 256, 4),
    "imdb": (4, 128, 512, 8),
    "listops": (4, 128, 512, 8),
    "pathfinder": (4, 128, 128, 8),
    "aan": (4, 128, 512, 4),
    "pathfinderx": (6, 64, 160, 8),
}


def build(**options) -> TransNormerLRA:
    values = {
        "num_classes": 5, "embed_dim": 24, "num_heads": 3, "block_size": 8, "expansion": 2
    } | options  # fmt: skip
    if "in_channels" not in values:
        values.setdefault("vocab_size", 20)
    return TransNormerLRA(TransNormerLRAConfig(**values))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", ["", "_t1", "_t2"])
def test_published_sizes(task, suffix) -> None:
    model = create_model(f"transnormer_lra_{task}{suffix}", device="meta")
    layers, dim, width, heads = TASKS[task]
    c = model.config
    assert (c.num_layers, c.embed_dim, c.width, c.num_heads) == (layers, dim, width, heads)
    assert c.block_size == 64
    kinds = [b.mixer.mechanism for b in model.layers]
    assert kinds == ["diag"] * (layers // 2) + ["norm"] * (layers - layers // 2)
    assert model.layers[0].mixer.config.kind == ("relu" if suffix == "_t1" else "softmax")


def test_six_rows_of_two_kinds() -> None:
    assert len(list_models("transnormer_lra_*")) == 12


@pytest.mark.parametrize("norm", ["batch", "synbatch", "layer", "simplerms"])
@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_padding_and_packing_change_nothing(norm, variant) -> None:
    """In training too: batch statistics leave padding out."""
    model = build(norm=norm, variant=variant).double()
    tokens, mask = torch.randint(20, (3, 30)), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 22:] = False
    mask[2, [0, 10, 29]] = False
    packed = torch.cat([tokens[i, mask[i]] for i in range(3)])[None]
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert_close(model(tokens, mask=mask), model(packed, cu_seqlens=borders), 1e-8)
    model.eval()
    rows = [model(tokens[i : i + 1, mask[i]]) for i in range(3)]
    assert_close(model(tokens, mask=mask), torch.cat(rows), 1e-9)


def test_the_simple_norm_is_per_token() -> None:
    """The published one mixes the rows of a batch; here a row does not see its neighbours."""
    model = build(norm="simplerms")
    tokens = torch.randint(20, (3, 30))
    assert_close(model(tokens)[:1], model(tokens[:1]), 1e-5)


def test_pixels_and_pairs() -> None:
    model = build(in_channels=1)
    assert model(torch.randn(2, 50, 1)).shape == (2, 5)
    pair = build(pair=True, num_classes=2).eval()
    tokens, mask = torch.randint(20, (3, 2, 30)), torch.ones(3, 2, 30, dtype=torch.bool)
    mask[1, 0, 20:] = False
    out = pair(tokens, mask=mask)
    assert out.shape == (3, 2)
    u = pair._mean(tokens[1, :1, :20], None, None)
    v = pair._mean(tokens[1, 1:], None, None)
    expected = pair.head(torch.cat((u, v, u - v, u * v), -1))
    assert_close(out[1:2], expected, 1e-5)
    with pytest.raises(ValueError, match="pairs"):
        pair(tokens[:, 0])


def test_a_causal_local_layer_masks_after_the_softmax_as_published() -> None:
    config = lra_diag_config(embed_dim=24, num_heads=3, variant="t2", norm="batch", block_size=8)
    layer = DiagAttention(config.replace(is_causal=True)).eval()
    x = torch.randn(1, 16, 24)
    later = x.clone()
    later[:, 6] += 1
    assert relative_error(layer(later)[:, :6], layer(x)[:, :6]) > 1e-3
    q, k, v = (
        p(x[:, :8]).unflatten(-1, (3, 8)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = layer.lrpe(q, k, torch.arange(8))
    weights = (q @ k.mT * 8**-0.5).softmax(-1).tril()
    expected = layer.out_proj((weights @ v).transpose(1, 2).flatten(-2))
    assert_close(layer(x)[:, :8], expected, 1e-5)


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_it_trains_and_saves(variant, tmp_path) -> None:
    model = build(variant=variant, num_classes=2)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    tokens = torch.randint(20, (16, 40))
    labels = (tokens == 3).any(1).long()
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens), labels)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save(tmp_path)
    again = TransNormerLRA.load(tmp_path).eval()
    assert torch.equal(again(tokens), model.eval()(tokens))


def test_errors_name_the_fix() -> None:
    with pytest.raises(ValueError, match="one of them"):
        TransNormerLRAConfig(num_classes=2)
    with pytest.raises(ValueError, match="synbatch"):
        build(norm="sync")
    with pytest.raises(ValueError, match="attention layers"):
        build().to_official()
