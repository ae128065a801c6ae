"""Queries, keys and values of encoders of other libraries, and what is not run for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.attention.softmax import softmax_weights
from manyheads.compress.minilm import capture_qkv
from manyheads.models.language.bert import BertConfig, BertEncoder

SIZES = {
    "vocab_size": 41, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 44, "max_position_embeddings": 20,
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(1, 41, (3, 9)), "attention_mask": mask}


def encoder(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**SIZES, attn_implementation="eager")
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize("kind", ["Bert", "Albert", "Roberta"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_is_what_the_library_computes(kind, layer) -> None:
    model, given = encoder(kind), batch()
    with torch.no_grad():
        expected = model(**given, output_attentions=True).attentions[layer]
        found = capture_qkv(model, given, layer=layer).qkv
    own = softmax_weights(found.query, found.key, mask=given["attention_mask"].bool())
    torch.testing.assert_close(own, expected)


def test_a_vision_encoder() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=12, patch_size=4, hidden_size=20, num_hidden_layers=2, num_attention_heads=5,
        intermediate_size=24,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    found = capture_qkv(model, {"pixel_values": torch.randn(1, 3, 12, 12)})
    assert found.qkv.value.shape == (1, 5, 10, 4)
    assert found.output is None


def ours() -> BertEncoder:
    return BertEncoder(BertConfig(**SIZES))


def test_the_rest_is_run_only_if_wanted() -> None:
    model, given = ours().eval(), batch()
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    stopped = capture_qkv(model, given)
    assert calls[-1].startswith("encoder.layer.2.attention.self.")
    assert not any(name.startswith("encoder.layer.2.intermediate") for name in calls)
    calls.clear()
    whole = capture_qkv(model, given, rest=True)
    assert calls[-1] == "encoder.layer.2.output.dense"
    assert torch.equal(stopped.qkv.query, whole.qkv.query)
    expected = model(given["input_ids"], mask=given["attention_mask"].bool(), output="both")
    torch.testing.assert_close(whole.output.features, expected.features)
    torch.testing.assert_close(whole.qkv.key, expected.key)


def test_hooks_are_gone_even_after_an_error() -> None:
    model = ours()
    capture_qkv(model, batch())
    with pytest.raises(ValueError, match="length 30 exceeds"):
        capture_qkv(model, {"input_ids": torch.ones(1, 30, dtype=torch.long)})
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_reach_the_model() -> None:
    model = ours()
    sum(t.sum() for t in capture_qkv(model, batch()).qkv).backward()
    assert model.encoder["layer"][0].output.dense.weight.grad.abs().sum() > 0
    assert model.encoder["layer"][2].output.dense.weight.grad is None


def test_no_such_layer_and_no_encoder() -> None:
    with pytest.raises(ValueError, match="layer 3 is outside the model's 3 layers"):
        capture_qkv(ours(), batch(), layer=3)
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=41, n_embd=12, n_layer=1, n_head=2, n_positions=20)
    with pytest.raises(ValueError, match="is a decoder"):
        capture_qkv(transformers.GPT2Model(config), batch())
