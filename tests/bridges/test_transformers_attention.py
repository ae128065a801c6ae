"""Our attention functions inside transformers' models: the same tokens as "eager"."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import AttentionMaskInterface

from compare import relative_error
from manyheads.attention.sla import sla
from manyheads.bridges.transformers import attention, register
from manyheads.bridges.transformers.attention import lean_attention, softmax_attention

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None, "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=7, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=20)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2,
            pad_token_id=0, eos_token_id=None, bos_token_id=None,
        )
    ),
}  # fmt: skip
EXACT = ("manyheads_softmax", "manyheads_lean")
GREEDY = {"max_new_tokens": 15, "do_sample": False}


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 61, (3, 13))
    mask = torch.ones_like(tokens)
    for row, padding in ((1, 5), (2, 12)):
        mask[row, :padding] = tokens[row, :padding] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.fixture
def many_workers(monkeypatch):
    """Let the smallest caches be dealt to two threads, in tiles of 4 keys."""
    monkeypatch.setattr(attention, "_TILE", 4)
    monkeypatch.setattr(attention, "default_workers", lambda *_, **__: 2)
    dealt = []
    run = attention.run_plan

    def counted(*args, **options):
        dealt.append(args[3])
        return run(*args, **options)

    monkeypatch.setattr(attention, "run_plan", counted)
    return dealt


@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_tokens_and_logits_are_those_of_eager(kind, name, side) -> None:
    model, inputs = MODELS[kind]().eval(), batch()
    if side == "none":
        del inputs["attention_mask"]
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    model.set_attn_implementation("eager")
    wanted = model.generate(**inputs, **options)
    model.set_attn_implementation(name)
    found = model.generate(**inputs, **options)
    assert len(wanted.sequences[:, 13:].unique()) > 5
    assert torch.equal(found.sequences, wanted.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_ragged_caches_are_dealt_without_copies(kind, many_workers) -> None:
    model, inputs = MODELS[kind]().eval(), batch()
    model.set_attn_implementation("eager")
    wanted = model.generate(**inputs, **GREEDY)
    model.set_attn_implementation("manyheads_lean")
    assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    # A window makes all rows alike once it is full.
    assert len(many_workers) >= (12 if kind == "mistral" else 3 * 14)
    assert all(plan.workers == 2 and len(set(plan.tiles)) > 1 for plan in many_workers[:3])


@pytest.mark.parametrize("name", EXACT)
def test_right_padding_beams_and_static_caches(name) -> None:
    model, inputs = MODELS["llama"]().eval(), batch()
    flipped = {k: v.flip(1) for k, v in inputs.items()}
    real = flipped["attention_mask"].bool()
    model.set_attn_implementation("eager")
    wanted = model(**flipped).logits[real], model.generate(**inputs, num_beams=3, **GREEDY)
    model.set_attn_implementation(name)
    assert relative_error(model(**flipped).logits[real], wanted[0]) < 1e-5
    assert torch.equal(model.generate(**inputs, num_beams=3, **GREEDY), wanted[1])
    prompt = inputs["input_ids"][:1]
    dynamic = model.generate(prompt, **GREEDY)
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(model.generate(prompt, cache=cache, **GREEDY), dynamic)


def test_gradients_are_those_of_eager() -> None:
    model, inputs = MODELS["llama"](), batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    # A first token would be predicted from padding, where "eager" attends to everything.
    labels[[1, 2], [5, 12]] = -100
    grads = []
    for name in ("eager", *EXACT):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert relative_error(grads[1], grads[0]) < 1e-5
    assert relative_error(grads[2], grads[0]) < 1e-5


def test_what_is_not_supported_raises() -> None:
    inputs = batch()
    soft = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8))
    sink = GptOssForCausalLM(GptOssConfig(**SIZES, head_dim=8, num_local_experts=2))
    for model, name in ((soft, "softcap"), (sink, "s_aux")):
        model.set_attn_implementation("manyheads_lean")
        with pytest.raises(ValueError, match=f"asks attention for {name}"):
            model(**inputs)
    model = MODELS["llama"]()
    model.config.attention_dropout = 0.1
    dropping = LlamaForCausalLM(model.config).train()
    dropping.set_attn_implementation("manyheads_softmax")
    with pytest.raises(ValueError, match=r"dropout 0\.1"):
        dropping(**inputs)
    model.set_attn_implementation("manyheads_sla")
    with pytest.raises(ValueError, match="is causal and manyheads_sla looks ahead"):
        model(**inputs)
    with pytest.raises(ValueError, match="did you mean 'manyheads_lean'"):
        register(["manyheads_leen"])


def test_a_mask_with_holes_and_a_bias() -> None:
    query, key = torch.randn(2, 4, 1, 20), torch.randn(2, 2, 37, 20)
    holes = torch.rand(2, 1, 1, 37) > 0.4
    for mask in (holes, torch.randn(2, 4, 1, 37), torch.zeros(2, 1, 1, 37, dtype=torch.bool)):
        found, _ = lean_attention(torch.nn.Identity(), query, key, key, mask)
        wanted, _ = softmax_attention(torch.nn.Identity(), query, key, key, mask)
        assert found.shape == (2, 1, 4, 20)
        torch.testing.assert_close(found, wanted)
    assert not found.any()


def test_a_lost_mask_is_found_out(monkeypatch) -> None:
    def without_mask(module, query, key, value, attention_mask, **options):
        return softmax_attention(module, query, key, value, None, **options)

    def with_look_ahead(module, query, key, value, attention_mask, **options):
        options["is_causal"] = False
        return softmax_attention(module, query, key, value, attention_mask, **options)

    for wrong, what in ((without_mask, "padding"), (with_look_ahead, "later token|padding")):
        monkeypatch.setitem(attention.ATTENTION, "manyheads_wrong", wrong)
        with pytest.raises(RuntimeError, match=what):
            register(["manyheads_wrong"])
        assert "manyheads_wrong" not in AttentionInterface._global_mapping
        assert "manyheads_wrong" not in AttentionMaskInterface._global_mapping


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    register(["manyheads_lean", "manyheads_sla"])
    assert torch.equal(torch.rand(1), wanted)


def test_sla_in_encoders(monkeypatch) -> None:
    register(["manyheads_sla"], sla_options={"topk": 0.3, "block_q": 4, "block_k": 4})
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "vocab_size")}
    sizes = {k: v for k, v in sizes.items() if not k.endswith("token_id")}
    vit = ViTModel(ViTConfig(**sizes, image_size=24, patch_size=4)).eval()
    image = torch.randn(2, 3, 24, 24)
    vit.set_attn_implementation("eager")
    wanted = vit(image).last_hidden_state
    vit.set_attn_implementation("manyheads_sla")
    sparse = vit(image).last_hidden_state
    assert 1e-3 < relative_error(sparse, wanted) < 1
    register(["manyheads_sla"], sla_options={"topk": 1.0})
    assert relative_error(vit(image).last_hidden_state, wanted) < 1e-5
    # Padding changes no real token, whatever stands in it.
    bert = BertModel(BertConfig(vocab_size=61, **sizes)).eval()
    bert.set_attn_implementation("manyheads_sla")
    register(["manyheads_sla"], sla_options={"topk": 0.3, "block_q": 4, "block_k": 4})
    inputs = batch()
    mask = inputs["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp_min(0)
    full = bert(**inputs, position_ids=places).last_hidden_state[1, 5:]
    alone = bert(inputs["input_ids"][1:2, 5:]).last_hidden_state[0]
    assert relative_error(full, alone) < 1e-5
    q = torch.randn(1, 2, 9, 16)
    found, _ = attention.sla_attention(
        torch.nn.Identity(), q, q, q, None, is_causal=False, options={"topk": 0.5, "block_k": 4}
    )
    torch.testing.assert_close(found.transpose(1, 2), sla(q, q, q, topk=0.5, block_k=4))
    with pytest.raises(ValueError, match="differs between queries"):
        attention.sla_attention(
            torch.nn.Identity(), q, q, q, torch.rand(1, 1, 9, 9) > 0.5, is_causal=False
        )
