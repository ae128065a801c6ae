"""The TransNormer encoder: sizes, padding as published and respected, heads, packing."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compare import assert_close, relative_error
from manyheads.models import create_model
from manyheads.models.language.transnormer_encoder import (
    TransNormerEncoder,
    TransNormerEncoderConfig,
)


def build(**options) -> TransNormerEncoder:
    values = {
        "vocab_size": 31, "embed_dim": 24, "num_layers": 4, "num_heads": 3, "block_size": 8,
        "max_positions": 40,
    } | options  # fmt: skip
    return TransNormerEncoder(TransNormerEncoderConfig(**values)).eval()


@pytest.mark.parametrize("name", ["roberta_transnormer_t1", "roberta_t2_base"])
def test_published_sizes(name) -> None:
    model = create_model(name, device="meta")
    assert model.num_parameters() == 124_673_241
    assert [b.mixer.mechanism for b in model.layers] == ["diag"] * 6 + ["norm"] * 6
    assert model.positions.weight.shape == (514, 768)


@pytest.mark.parametrize("variant", ["t1", "t2"])
@pytest.mark.parametrize(
    "options", [{}, {"learned_positions": False, "scale_embedding": True}, {"pre_norm": True}]
)
def test_a_mask_makes_padding_absent(variant, options) -> None:
    model = build(variant=variant, **options).double()
    tokens, mask = torch.randint(2, 31, (3, 30)), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 22:] = False
    mask[2, [0, 10, 29]] = False
    with torch.no_grad():
        logits = model(tokens, mask=mask)
        rows = [model(tokens[i : i + 1, mask[i]]) for i in range(3)]
        for i, row in enumerate(rows):
            assert_close(logits[i : i + 1, mask[i]], row, 1e-9)
        packed = torch.cat([tokens[i, mask[i]] for i in range(3)])[None]
        borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
        assert_close(model(packed, cu_seqlens=borders), torch.cat(rows, 1), 1e-9)


def test_padding_ids_are_ignored_by_attention_as_published() -> None:
    """Without a mask a pad's features are zero at the bottom, but it is attended to."""
    tokens = torch.randint(2, 31, (2, 20))
    tokens[1, 14:] = 1
    published, respectful = build(), build(respect_padding=True)
    respectful.load_state_dict(published.state_dict())
    with torch.no_grad():
        out = respectful(tokens)
        assert_close(out[1:, :14], published(tokens[1:, :14]), 1e-5)
        assert relative_error(published(tokens)[1:, :14], out[1:, :14]) > 1e-3
        assert_close(published(tokens)[0], out[0], 1e-5)
        assert_close(published(tokens, mask=tokens != 1)[1, :14], out[1, :14], 1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_classifier_grows_from_a_pretrained_encoder(pooling) -> None:
    pretrained = build(variant="t2")
    model = pretrained.with_classifier(5, pooling=pooling).eval()
    tokens, mask = torch.randint(2, 31, (3, 30)), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 22:] = False
    assert_close(model.features(tokens), pretrained.features(tokens), 1e-6)
    classes = model(tokens, mask=mask)
    assert classes.shape == (3, 5)
    rows = [model(tokens[i : i + 1, mask[i]]) for i in range(3)]
    assert_close(classes, torch.cat(rows), 1e-4)
    packed = torch.cat([tokens[i, mask[i]] for i in range(3)])[None]
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert_close(model(packed, cu_seqlens=borders), torch.cat(rows), 1e-4)
    model.train()
    F.cross_entropy(model(tokens), torch.tensor([0, 1, 2])).backward()
    without = {k for k, p in model.named_parameters() if p.grad is None}
    assert without == {f"layers.{i}.mixer.lrpe.v" for i in range(4)}
    other = build(variant="t2", head="classify", num_classes=5, pooling=pooling)
    other.load_official(model.to_official())
    assert_close(other.eval()(tokens), model.eval()(tokens), 1e-6)


def test_heads_and_official_names(tmp_path) -> None:
    model, tokens = build(), torch.randint(2, 31, (2, 20))
    official = model.to_official()
    assert official["encoder.lm_head.weight"].shape == (31, 24)
    bare = {k.removeprefix("encoder."): t for k, t in official.items()}
    for weights in (official, bare):
        assert torch.equal(build().load_official(weights)(tokens), model(tokens))
    features = build(head="none").load_official(official)
    assert torch.equal(features(tokens), model.features(tokens))
    model.save(tmp_path)
    assert torch.equal(TransNormerEncoder.load(tmp_path).eval()(tokens), model(tokens))


def test_masked_language_modelling_trains() -> None:
    model = build(variant="t1", dropout=0.0).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    whole = torch.arange(4, 28).repeat(4, 1)
    hidden = torch.rand(4, 24) < 0.3
    losses = []
    for _ in range(30):
        logits = model(whole.masked_fill(hidden, 2))
        loss = F.cross_entropy(logits[hidden], whole[hidden])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_it_compiles_without_graph_breaks() -> None:
    model, tokens = build(num_layers=2), torch.randint(31, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(tokens)
    assert_close(out, model(tokens), 1e-4)
    out.square().mean().backward()


def test_errors_name_the_fix() -> None:
    with pytest.raises(ValueError, match="max_positions 40"):
        build()(torch.randint(2, 31, (1, 41)))
    longer = torch.full((1, 45), 5)
    mask = torch.ones(1, 45, dtype=torch.bool)
    mask[:, :5] = False
    assert build()(longer, mask=mask).shape == (1, 45, 31)
    assert build(learned_positions=False)(longer).shape == (1, 45, 31)
    for options, reason in (
        ({"head": "classify"}, "num_classes"),
        ({"num_classes": 3}, "num_classes"),
        ({"head": "lm"}, "mlm"),
        ({"pooling": "last"}, "mean"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(**options)
