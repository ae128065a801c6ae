"""BERT: equal to transformers' own, padding, positions, folders and errors."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.compress.minilm import load_bert, save_bert
from manyheads.models import create_model, load_model
from manyheads.models.language.bert import BertConfig, BertEncoder

TINY = {
    "vocab_size": 41, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 44, "max_position_embeddings": 20,
}  # fmt: skip


def tiny(**changes) -> BertEncoder:
    return BertEncoder(BertConfig(**TINY | changes)).eval()


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_equals_transformers(act) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertModel(transformers.BertConfig(**TINY, hidden_act=act)).eval()
    own = tiny(hidden_act=act).load_official(theirs.state_dict())
    tokens, mask = torch.randint(0, 41, (3, 11)), torch.ones(3, 11, dtype=torch.bool)
    mask[0, 6:] = False
    mask[1, :4] = False
    segments = torch.randint(0, 2, (3, 11))
    expected = theirs(input_ids=tokens, attention_mask=mask.long(), token_type_ids=segments)
    features = own(tokens, mask=mask, segments=segments).features
    torch.testing.assert_close(features, expected.last_hidden_state)
    torch.testing.assert_close(own.pooled(features), expected.pooler_output)


def test_padding_changes_nothing_and_empty_rows_are_finite() -> None:
    model, tokens = tiny(), torch.randint(1, 41, (2, 7))
    alone = model(tokens).features
    padded = torch.cat((tokens, torch.randint(1, 41, (2, 5))), 1)
    mask = torch.arange(12).expand(2, 12) < 7
    torch.testing.assert_close(model(padded, mask=mask).features[:, :7], alone)
    mask = mask & torch.tensor([[True], [False]])
    assert torch.isfinite(model(padded, mask=mask).features).all()


def test_projections_of_the_last_layer() -> None:
    model, tokens = tiny(), torch.randint(1, 41, (2, 7))
    both, only = (model(tokens, output=o) for o in ("both", "qkv"))
    assert only.features is None
    assert only.query.shape == (2, 4, 7, 9)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(both, name), getattr(only, name))
    assert torch.equal(both.features, model(tokens).features)


def test_old_files_and_prefixes() -> None:
    model = tiny()
    state = {f"bert.{k}": t for k, t in model.to_official().items()}
    state |= {"bert.embeddings.position_ids": torch.arange(20)[None], "cls.bias": torch.zeros(3)}
    again = tiny().load_official(state)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"missing 'pooler\.dense\.weight'"):
        tiny().load_official({k: t for k, t in state.items() if "pooler" not in k})


@pytest.mark.parametrize("pooler", [True, False])
def test_folders_of_both_kinds(tmp_path, pooler) -> None:
    model, tokens = tiny(add_pooler=pooler), torch.randint(1, 41, (2, 7))
    save_bert(model, tmp_path / "hf")
    model.save(tmp_path / "own")
    for folder in ("hf", "own"):
        read = load_bert(tmp_path / folder)
        assert (read.pooler is not None) == pooler
        assert torch.equal(read(tokens).features, model(tokens).features)
    assert isinstance(load_model(tmp_path / "own"), BertEncoder)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(theirs(input_ids=tokens).last_hidden_state, model(tokens).features)


def test_folders_that_hold_none(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_bert(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_bert(tmp_path)
    with pytest.raises(ValueError, match="model_type 'gpt2' is no BERT"):
        BertConfig.from_official({"model_type": "gpt2"})
    with pytest.raises(ValueError, match="position_embedding_type"):
        BertConfig.from_official({"position_embedding_type": "relative_key"})


def test_errors() -> None:
    with pytest.raises(ValueError, match="hidden_size 36 is not a multiple"):
        tiny(num_attention_heads=5)
    with pytest.raises(ValueError, match="length 21 exceeds"):
        tiny()(torch.ones(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="output 'all'"):
        tiny()(torch.ones(1, 2, dtype=torch.long), output="all")
    with pytest.raises(ValueError, match="no pooler"):
        tiny(add_pooler=False).pooled(torch.zeros(1, 2, 36))


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("minilm_l12_h384_uncased", 21_293_568),
        ("minilm_l6_h384_uncased", 10_646_784),
        ("minilm_l6_h768_uncased", 42_527_232),
    ],
)
def test_layers_have_the_published_parameters(name, encoder) -> None:
    model = create_model(name, device="meta")
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
