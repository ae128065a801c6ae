"""A LLaMA of transformers inside our landmark model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from compare import relative_error
from manyheads.bridges.transformers import ManyheadsForCausalLM, landmark_from_llama

SIZES = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip


def llama(**changes) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}])
def test_logits_agree_where_no_landmark_is(changes) -> None:
    theirs = llama(**changes)
    ours = landmark_from_llama(theirs, freq=7)
    assert (ours.config.vocab_size, ours.config.landmark_id) == (62, 61)
    assert not ours.training
    ids = torch.randint(61, (2, 23))
    assert relative_error(ours(ids)[..., :61], theirs(ids).logits) < 1e-5
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[0, :9] = False
    found, wanted = ours(ids, mask=mask), theirs(ids, attention_mask=mask.long()).logits
    assert relative_error(found[mask][:, :61], wanted[mask]) < 1e-5
    mean = theirs.model.embed_tokens.weight.mean(0)
    torch.testing.assert_close(ours.embed.weight[61], mean)
    assert (ours.head.weight is ours.embed.weight) == bool(changes)


def test_the_first_block_is_generated_as_the_llama_does() -> None:
    theirs = llama()
    ours = ManyheadsForCausalLM.from_model(landmark_from_llama(theirs, freq=40, train_context=200))
    ids = torch.randint(61, (2, 9))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))
    assert ours.generate(ids.repeat(1, 8), **options).shape == (2, 92)


@pytest.mark.parametrize("form", ["dict", "file", "folder"])
def test_a_published_difference_is_added(form, tmp_path) -> None:
    base, tuned = llama(), llama()
    tuned.resize_token_embeddings(62, mean_resizing=False)
    start = landmark_from_llama(base).to_official()
    wanted = tuned.state_dict()
    difference = {k: t - start[k] for k, t in wanted.items()}
    if form == "file":
        save_file(difference, tmp_path / "model.safetensors")
        difference = tmp_path / "model.safetensors"
    elif form == "folder":
        half = len(difference) // 2
        for i, part in enumerate((list(difference)[:half], list(difference)[half:])):
            save_file({k: difference[k] for k in part}, tmp_path / f"model-{i}.safetensors")
        difference = tmp_path
    ours = landmark_from_llama(base, difference=difference)
    ids = torch.randint(61, (2, 23))
    assert relative_error(ours(ids), tuned(ids).logits) < 1e-5


def test_folders_and_dtypes(tmp_path) -> None:
    theirs = llama().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = landmark_from_llama(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert torch.equal(ours.head.weight[:61], theirs.lm_head.weight)
    with pytest.raises(ValueError, match=r"no config\.json"):
        landmark_from_llama(tmp_path.parent)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 16},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    ],
)
def test_other_llamas_are_refused(changes) -> None:
    name = next(iter(changes)).replace("rope_parameters", "rope_type")
    with pytest.raises(ValueError, match=f"{name}=.* is not what a LandmarkLlama can hold"):
        landmark_from_llama(llama(**changes))
    with pytest.raises(ValueError, match="do not fit"):
        landmark_from_llama(llama(), difference={"model.norm.weight": torch.ones(40)})
