"""Our language models under transformers: generation, caches, padding, files, training."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    Trainer,
    TrainingArguments,
)

from bridges.models import FAMILIES, VOCAB, build, tokens
from compare import relative_error
from manyheads.bridges.transformers import ManyheadsCache, ManyheadsConfig, ManyheadsForCausalLM
from manyheads.data import ByteTokenizer, load_text
from manyheads.models.language.causal import next_token_loss

GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
KEY_VALUE = ("softmax", "placed", "lean")


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached_generation(name) -> None:
    model, prompt = build(name), tokens(3, 13)
    cached = model.generate(prompt, **GREEDY)
    assert cached.shape == (3, 22)
    assert len(cached[:, 13:].unique()) > 3, "the model repeats itself: the test would see nothing"
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **GREEDY))
    own = torch.stack(list(model.model.generate(prompt, max_new_tokens=9, temperature=0)), 1)
    assert torch.equal(cached[:, 13:], own)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_equals_single_rows(name, side) -> None:
    model, lengths = build(name), (13, 7, 1)
    rows = [tokens(1, n) for n in lengths]
    batch, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(13 - row.shape[1], 13) if side == "left" else slice(row.shape[1])
        batch[i, at], mask[i, at] = row[0], 1
    found = model.generate(batch, attention_mask=mask, **GREEDY)[:, 13:]
    wanted = torch.cat([model.generate(r, **GREEDY)[:, r.shape[1] :] for r in rows])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams_are_reordered(name) -> None:
    model, prompt = build(name), tokens(2, 11)
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 2}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert not torch.equal(cached, model.generate(prompt, **GREEDY).repeat_interleave(2, 0))


def test_sampling_and_chunks_of_a_prompt() -> None:
    model, prompt = build("hybrid"), tokens(2, 23)
    drawn = []
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 7}):
        torch.manual_seed(3)
        options = {"max_new_tokens": 9, "do_sample": True, "top_k": 7, "pad_token_id": 0} | options
        drawn.append(model.generate(prompt, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """The same weights to the bit, and logits up to how tensors are aligned in memory."""
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    ids = tokens(2, 17)
    assert relative_error(a(ids).logits, b(ids).logits) < 1e-6


def read(model: ManyheadsForCausalLM, parts: list[torch.Tensor], cache: ManyheadsCache):
    return torch.cat([model(p, cache=cache).logits for p in parts], 1)


@pytest.mark.parametrize("name", KEY_VALUE)
def test_key_value_layers_crop_exactly(name) -> None:
    model, ids = build(name), tokens(2, 17)
    cache, straight = model.new_cache(), model.new_cache()
    read(model, [ids[:, :9], tokens(2, 1), tokens(2, 4)], cache)
    assert cache.is_croppable
    cache.crop(-5)
    assert cache.get_seq_length() == 9
    found = read(model, [ids[:, 9:12], ids[:, 12:13], ids[:, 13:]], cache)
    read(model, [ids[:, :9]], straight)
    wanted = read(model, [ids[:, 9:12], ids[:, 12:13], ids[:, 13:]], straight)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_cropping_counts_real_tokens_alone() -> None:
    model, ids = build("softmax"), tokens(2, 9)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    cache = model.new_cache()
    model(ids, attention_mask=mask, cache=cache)
    cache.crop(-3)
    more = tokens(2, 2)
    mask = torch.cat((mask[:, :6], torch.ones(2, 2, dtype=torch.long)), 1)
    found = model(more, attention_mask=mask, cache=cache).logits
    wanted = model(torch.cat((ids[1:, :4], more[1:]), 1)).logits[:, -2:]
    assert relative_error(found[1:], wanted) < 1e-5


@pytest.mark.parametrize("name", ["gla", "hybrid", "others", "mamba_lm", "blocks", "routing"])
def test_recurrent_layers_crop_what_was_recorded(name) -> None:
    model, ids = build(name), tokens(2, 19)
    cache = model.new_cache()
    read(model, [ids[:, :9]], cache)
    cache.activate_past_recording()
    read(model, [ids[:, 9:12], tokens(2, 5), tokens(2, 1)], cache)
    cache.crop(-6)  # to the end of a block
    read(model, [torch.cat((ids[:, 12:14], tokens(2, 3)), 1), tokens(2, 1)], cache)
    cache.crop(-4)  # into a block
    assert cache.get_seq_length() == 14
    found = read(model, [ids[:, 14:]], cache)
    assert relative_error(found, model(ids).logits[:, 14:]) < 1e-5
    cache.crop(0)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-6)


@pytest.mark.parametrize("name", ["blocks", "routing", "hybrid"])
@torch.no_grad()  # states are written in place only where nothing is differentiated
def test_steps_that_are_taken_back_leave_no_trace(name) -> None:
    model, ids = build(name), tokens(2, 27)
    cache = model.new_cache()
    read(model, [ids[:, :19]], cache)
    cache.activate_past_recording()
    read(model, [tokens(2, 1) for _ in range(6)], cache)  # written over the oldest of a full ring
    cache.crop(-6)
    found = read(model, [ids[:, 19:]], cache)
    assert relative_error(found, model(ids).logits[:, 19:]) < 1e-5


def test_recurrent_states_refuse_to_be_cut() -> None:
    model = build("hybrid")
    cache = model.new_cache()
    model(tokens(2, 9), cache=cache)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"AarenState.*cannot be cut back"):
        cache.crop(-1)
    assert cache.get_seq_length() == 9


def test_assisted_generation_gives_the_same_tokens() -> None:
    model, prompt = build("hybrid"), tokens(1, 6).repeat(1, 4)
    plain = model.generate(prompt, **GREEDY)
    assert torch.equal(plain, model.generate(prompt, prompt_lookup_num_tokens=3, **GREEDY))
    assert torch.equal(plain, model.generate(prompt, assistant_model=build("gla"), **GREEDY))


@pytest.mark.parametrize("name", ["softmax", "hybrid"])
def test_a_cache_is_repeated_selected_copied_and_reset(name) -> None:
    model, ids, more = build(name), tokens(3, 9), tokens(3, 4)
    cache = model.new_cache()
    model(ids, cache=cache)
    branch = copy.deepcopy(cache)
    wanted = model(more, cache=cache).logits
    branch.batch_repeat_interleave(2)
    branch.batch_select_indices(torch.tensor([4, 1]))
    assert branch.batch_size == 2
    assert branch.model is cache.model
    found = model(more[[2, 0]], cache=branch).logits
    assert relative_error(found, wanted[[2, 0]]) < 1e-6
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    model(ids, cache=cache)
    assert relative_error(model(more, cache=cache).logits, wanted) < 1e-6


def test_generation_goes_on_from_a_cache() -> None:
    model, prompt = build("hybrid"), tokens(2, 11)
    cache = model.new_cache()
    model(prompt[:, :6], cache=cache)
    assert torch.equal(
        model.generate(prompt, cache=cache, **GREEDY), model.generate(prompt, **GREEDY)
    )


FIXED = ("transnormer", "routing")  # whether their output matrix is the embedding is no option
WAYS = [(n, t) for n in FAMILIES if n not in FIXED for t in (True, False)]


@pytest.mark.parametrize(("name", "tie"), [*WAYS, *((n, None) for n in FIXED)])
def test_save_and_load_give_the_same_logits(name, tie, tmp_path) -> None:
    model = build(name) if tie is None else build(name, tie_embeddings=tie)
    ids = tokens(2, 17)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is ManyheadsForCausalLM
    assert not loaded.training
    assert_same(loaded, model)
    assert loaded.num_parameters() == model.num_parameters()
    if tie is not None:
        assert (loaded.model.head.weight is loaded.model.embed.weight) == tie
    base = AutoModel.from_pretrained(tmp_path)
    hidden = base(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    head = model.model.head
    again = head(hidden, model.model.embed.weight) if name == "transnormer" else head(hidden)
    torch.testing.assert_close(again, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_base_model_reads_with_a_cache(tmp_path) -> None:
    model, ids = build("hybrid"), tokens(2, 9)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    start = base(ids[:, :8], use_cache=True)
    end = base(ids[:, 8:], cache=start.cache).last_hidden_state
    assert end.shape == (2, 1, 32)
    assert relative_error(end, base(ids).last_hidden_state[:, 8:]) < 1e-5


def test_missing_weights_are_an_error(tmp_path) -> None:
    build("gla").save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["settings"]["mixers"] = "gla*3"
    del described["layer_types"], described["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"do not fit a MixerLM: missing_keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_own_folders_and_models_are_wrapped(tmp_path) -> None:
    model = build("gla_lm")
    model.model.save(tmp_path)
    loaded = ManyheadsForCausalLM.from_folder(tmp_path)
    assert_same(loaded, model)
    shared = ManyheadsForCausalLM.from_model(loaded.model)
    assert shared.model is loaded.model


def test_half_precision_and_meta(tmp_path) -> None:
    model, ids = build("hybrid", tie_embeddings=False), tokens(2, 9)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.head.weight.dtype == half(ids).logits.dtype == torch.bfloat16
    assert relative_error(half(ids).logits.float(), model(ids).logits) < 0.1
    assert half.generate(ids, **GREEDY).shape == (2, 18)
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config)
    assert all(p.is_meta for p in meta.parameters())
    assert meta.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("tie", [True, False])
def test_the_vocabulary_grows(tie, tmp_path) -> None:
    model, ids = build("hybrid", tie_embeddings=tie), tokens(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 3)
    assert model.config.vocab_size == VOCAB + 3
    torch.testing.assert_close(model(ids).logits[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.model.head.weight is loaded.model.embed.weight) == tie
    assert_same(loaded, model)


def test_the_loss_knows_padding_and_labels() -> None:
    model, ids = build("hybrid"), tokens(2, 11)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    labels = ids.clone()
    labels[0, 5] = -100
    found = model(ids, attention_mask=mask, labels=labels).loss
    wanted = next_token_loss(model(ids, attention_mask=mask).logits, labels, mask.bool())
    torch.testing.assert_close(found, wanted)
    other = torch.where(mask.bool(), ids, 5)
    torch.testing.assert_close(found, model(other, attention_mask=mask, labels=labels).loss)
    split = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=30).loss
    torch.testing.assert_close(split, wanted * 15 / 30)


def test_trainer_lowers_the_loss_on_text(tmp_path) -> None:
    text = ByteTokenizer().encode(load_text("builtin:python", max_bytes=33 * 400).data)
    rows = text[: len(text) // 33 * 33].view(-1, 33)
    data = [{"input_ids": row, "labels": row} for row in rows]
    torch.manual_seed(0)
    config = ManyheadsConfig(
        settings={"mixers": "gla,softmax", "embed_dim": 32, "num_heads": 2}, use_cache=False
    )
    model = ManyheadsForCausalLM(config)
    options = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data[::6])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before > 5.4
    assert after < 3.6
    trainer.save_model(tmp_path / "final")
    trained = model.eval()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(loaded.model.embed.weight, trained.model.embed.weight)
    assert relative_error(loaded(rows[:2]).logits, trained(rows[:2]).logits) < 1e-6


def test_wrong_input_says_what_is_wrong() -> None:
    model, ids = build("gla"), tokens(2, 9)
    with pytest.raises(ValueError, match="did you mean 'MixerLM'"):
        ManyheadsConfig(family="MixrLM")
    with pytest.raises(ValueError, match="did you mean 'embed_dim'"):
        ManyheadsConfig(settings={"embed_dims": 3})
    with pytest.raises(ValueError, match="no causal language model"):
        ManyheadsConfig(family="MixerEncoder")
    with pytest.raises(ValueError, match="hidden_size=7 contradicts"):
        ManyheadsConfig(hidden_size=7)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\).*\(2, 9\)"):
        model(ids, attention_mask=torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 8\)"):
        model(ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="DynamicCache that is not this model's"):
        model(ids, cache=DynamicCache())
    with pytest.raises(ValueError, match="not this model's"):
        model(ids, cache=build("gla").new_cache())
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="length >= 1"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match="does not support"):
        model.gradient_checkpointing_enable()
    cache = model.new_cache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="batch 1, the cache holds 2 rows"):
        model(ids[:1], cache=cache)


LANDMARK = {
    "vocab_size": VOCAB, "landmark_id": VOCAB - 1, "embed_dim": 32, "num_layers": 2,
    "num_heads": 2, "freq": 5, "train_context": 120,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "more"), [("LandmarkGPT", {}), ("LandmarkLlama", {"mlp_width": 48})]
)
def test_landmark_models_put_landmarks_in_by_themselves(family, more, tmp_path) -> None:
    config = ManyheadsConfig(
        family=family, settings=LANDMARK | more, cache_options={"top_k": 9, "positions": "exact"}
    )
    model = ManyheadsForCausalLM(config).eval()
    ids = torch.randint(VOCAB - 1, (2, 23))
    with torch.no_grad():
        model.model.embed.weight.mul_(9)
    cached = model.generate(ids, **GREEDY)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **GREEDY))
    beams = GREEDY | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    cache = model.new_cache()
    cache.activate_past_recording()
    model(ids[:, :9], cache=cache)
    model(torch.cat((ids[:, 9:11], ids[:, :6]), 1), cache=cache)
    cache.crop(-6)
    found = model(ids[:, 11:], cache=copy.deepcopy(cache)).logits
    assert relative_error(found, model(ids).logits[:, 11:]) < 1e-5
    model.save_pretrained(tmp_path)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    hidden = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
    assert relative_error(model.model.head(hidden), model(ids).logits) < 1e-5
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="rows of a"):
            model.generate(ids, attention_mask=mask, use_cache=use_cache, **GREEDY)
    with pytest.raises(ValueError, match="landmark"):
        model(torch.full_like(ids, VOCAB - 1))
    raw = ManyheadsForCausalLM.from_model(model.model, insert_landmarks=False)
    assert raw(torch.full_like(ids, VOCAB - 1)).logits.shape == (2, 23, VOCAB)
    with pytest.raises(ValueError, match="insert_landmarks=True"):
        raw.generate(ids, **GREEDY)
