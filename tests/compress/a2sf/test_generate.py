"""Evicting caches inside transformers' generate(), on one tiny model of each family."""

from __future__ import annotations

import copy

import pytest
import torch

from compress.families import CAUSAL, VOCAB, batches, build
from manyheads.choose.memory import largest_tensor_numel
from manyheads.compress import Plan, get_procedure
from manyheads.compress.a2sf import (
    A2SF,
    H2O,
    SinkRecent,
    SnapKV,
    StreamingLLM,
    bits_per_byte,
    continuation_loss,
)

transformers = pytest.importorskip("transformers")

from manyheads.bridges.transformers import register  # noqa: E402
from manyheads.bridges.transformers.eviction import EvictingCache  # noqa: E402
from manyheads.compress.files import load_model, save_model  # noqa: E402

POLICIES = {
    "a2sf": A2SF(budget=9, recent=3, sink=1, alpha=0.5),
    "h2o": H2O(budget=9),
    "snapkv": SnapKV(budget=9, window=3),
    "sink-recent": SinkRecent(budget=9, sink=2),
    "streaming": StreamingLLM(budget=9, sink=2),
}


def prompt(rows: int = 2, length: int = 23) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def generate(model, ids, *, count: int = 7, **options):
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False} | options
    return model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa", "manyheads_lean"])
@pytest.mark.parametrize("family", CAUSAL)
def test_a_budget_that_holds_all_changes_no_bit(family, attention) -> None:
    if attention == "manyheads_lean":
        register([attention])
    model = build(family)
    model.set_attn_implementation(attention)
    ids = prompt()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    for given in (torch.ones_like(ids), mask):
        plain = generate(model, ids, attention_mask=given)
        with A2SF(budget=40, alpha=0.3).attach(model) as cache:
            ours = generate(model, ids, attention_mask=given, cache=cache)
        assert torch.equal(plain.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
        assert model.config._attn_implementation == attention


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", CAUSAL)
def test_layers_hold_their_budget(family, policy) -> None:
    model = build(family)
    if policy == "streaming" and family in ("gpt2", "opt"):
        with pytest.raises(ValueError, match="sink-recent"), POLICIES[policy].attach(model):
            pass
        assert model.config._attn_implementation == "sdpa"
        return
    with POLICIES[policy].attach(model) as cache:
        out = generate(model, prompt(), cache=cache)
        assert cache.lengths() == [9] * 4
        assert cache.get_seq_length() == 23 + 6
        assert cache.positions(1).shape == (
            2,
            2 if family in ("llama", "mistral", "qwen") else 4,
            9,
        )
        held = cache.nbytes
        generate(model, out.sequences, cache=cache)
        assert cache.nbytes == held
    assert all(torch.isfinite(t).all() for t in out.logits)


@pytest.mark.parametrize("attention", ["sdpa", "manyheads_lean"])
@pytest.mark.parametrize("policy", POLICIES)
def test_attention_functions_agree(policy, attention) -> None:
    register(["manyheads_lean"])
    model, results = build("llama"), []
    for name in ("eager", attention):
        model.set_attn_implementation(name)
        with POLICIES[policy].attach(model) as cache:
            results.append(generate(model, prompt(), cache=cache))
    for a, b in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_row_reads_as_it_does_alone(policy, attention) -> None:
    model = build("llama")
    model.set_attn_implementation(attention)
    for padding in (7, 18):  # more, and fewer, real tokens than the budget
        ids = prompt()
        mask = torch.ones_like(ids)
        mask[1, :padding] = 0
        with POLICIES[policy].attach(model) as cache:
            both = generate(model, ids, attention_mask=mask, cache=cache)
        with POLICIES[policy].attach(model) as cache:
            alone = generate(model, ids[1:, padding:], cache=cache)
        for a, b in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-5)


def test_streaming_counts_positions_inside_the_cache() -> None:
    # With one layer a key depends on its token alone: the same as a text without the gap.
    model = build("llama", layers=1)
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.data *= 20  # so that it matters where a key lies
    ids = prompt(length=30)
    steps = {}
    for name in ("streaming", "sink-recent"):
        with POLICIES[name].attach(model) as cache, torch.no_grad():
            model(ids[:, :20], cache=cache)
            for t in range(20, 30):
                out = model(ids[:, t : t + 1], cache=cache).logits[:, -1]
            steps[name] = out
    short = torch.cat((ids[:, :2], ids[:, 22:]), 1)  # nine held and the new one
    with torch.no_grad():
        expected = model(short).logits[:, -1]
    torch.testing.assert_close(steps["streaming"], expected, rtol=1e-4, atol=1e-5)
    assert (steps["sink-recent"] - expected).abs().max() > 1e-3


def test_beams_take_their_tokens_along() -> None:
    model, ids = build("llama"), prompt()
    plain = generate(model, ids, num_beams=3)
    with A2SF(budget=40).attach(model) as cache:
        ours = generate(model, ids, num_beams=3, cache=cache)
    assert torch.equal(plain.sequences, ours.sequences)
    with POLICIES["a2sf"].attach(model) as cache:
        generate(model, ids, num_beams=3, cache=cache)
        state = cache.layers[0].state
        before = state.held["position"].clone()
        order = torch.tensor([3, 3, 0, 1, 2, 5])
        cache.reorder_cache(order)
        assert torch.equal(state.held["position"], before[order])


def test_a_prompt_in_chunks() -> None:
    model, ids = build("llama"), prompt()
    plain = generate(model, ids)
    with A2SF(budget=40).attach(model):
        ours = generate(model, ids, prefill_chunk_size=5)
    for a, b in zip(plain.logits, ours.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with A2SF(budget=0.5, recent=2).attach(model):
        out = generate(model, ids, prefill_chunk_size=5)
        with pytest.raises(ValueError, match="give max_new_tokens"):
            model.generate(ids, prefill_chunk_size=5, max_length=30, do_sample=False)
    assert out.cache.lengths() == [12] * 4  # half of 23, not of the first chunk


def test_a_sliding_window_stays_one() -> None:
    config = build("mistral").config
    config.sliding_window = 8
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    plain = generate(model, prompt())
    for policy, kind in ((A2SF(budget=30), "own"), (A2SF(budget=1.0), "evicting")):
        with policy.attach(model) as cache:
            assert isinstance(cache, EvictingCache)
            ours = generate(model, prompt(), cache=cache)
        assert (type(cache.layers[0]).__name__ == "EvictingLayer") == (kind == "evicting")
        for a, b in zip(plain.logits, ours.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with A2SF(budget=5, recent=2).attach(model) as cache:
        generate(model, prompt(), cache=cache)
    assert cache.lengths() == [5] * 4
    assert (cache.layers[0].state.seen - cache.positions(0) <= 8).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_whisper_forgets_what_it_said_and_nothing_it_heard(attention) -> None:
    model = build("whisper")
    model.set_attn_implementation(attention)
    mels = batches("whisper", count=1)[0]["input_features"]
    start = torch.randint(3, VOCAB, (3, 6))

    def run(**options):
        return transformers.GenerationMixin.generate(
            model, input_features=mels, decoder_input_ids=start, max_new_tokens=12,
            min_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True,
            **options,
        )  # fmt: skip

    plain = run()
    with A2SF(budget=40).attach(model) as cache:
        ours = run(cache=cache)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
    with POLICIES["a2sf"].attach(model) as cache:
        run(cache=cache)
    assert cache.self_attention_cache.lengths() == [9] * 4
    assert cache.cross_attention_cache.layers[0].keys.shape[2] == 20


def test_int8_generates_about_the_same() -> None:
    model, ids = build("llama"), prompt()
    plain = generate(model, ids)
    with A2SF(budget=40, bits=8).attach(model) as cache:
        ours = generate(model, ids, cache=cache)
        assert cache.layers[0].state.held["key"].dtype == torch.int8
        assert cache.layers[0].keys.dtype == torch.float32
    error = (plain.logits[1] - ours.logits[1]).square().mean().sqrt()
    assert 0 < error < 0.02 * plain.logits[1].square().mean().sqrt()


def test_generate_makes_a_fresh_cache_at_each_call() -> None:
    model, ids = build("gpt2"), prompt()
    with POLICIES["h2o"].attach(model) as cache:
        old_name = generate(model, ids, past_key_values=cache)
        assert old_name.cache is cache
        first, again = (generate(model, ids) for _ in range(2))
    assert torch.equal(first.sequences, again.sequences)
    assert first.cache.lengths() == [9] * 4
    assert not isinstance(generate(model, ids).cache, EvictingCache)


def test_the_matrix_of_a_prompt_is_never_held() -> None:
    model, ids = build("llama", layers=1), prompt(1, 2500)
    with torch.no_grad(), H2O(budget=64).attach(model) as cache:
        largest = largest_tensor_numel(
            model, ids, attention_mask=torch.ones_like(ids), cache=cache,
            logits_to_keep=1,
        )  # fmt: skip
    assert largest <= 1 << 22 < 2500**2


@pytest.mark.parametrize("name", POLICIES)
def test_a_plan_is_saved_applied_and_loaded_again(name, tmp_path) -> None:
    model = build("llama")
    options = {"budget_tokens": 9, **({"sink": 2} if name == "streaming" else {})}
    plan = get_procedure(name)(**options).plan(model, batches("llama", length=29))
    assert plan.measured["cache_bytes"] < plan.measured["cache_bytes_full"]
    assert plan.measured["loss"] != plan.measured["loss_full"]
    plan.save(tmp_path / "plan.json")
    small = Plan.load(tmp_path / "plan.json").apply(model)
    out = generate(small, prompt())
    assert out.cache.lengths() == [9] * 4
    assert not isinstance(generate(model, prompt()).cache, EvictingCache)
    with torch.no_grad():
        assert small(prompt(), use_cache=True).cache.lengths() == [9] * 4
        torch.testing.assert_close(small(prompt()).logits, model(prompt()).logits)
    loaded = load_model(save_model(small, tmp_path / "small"))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again = plan.apply(plan.apply(model, inplace=False), inplace=True)
    assert len(again._forward_pre_hooks) == 1
    with H2O(budget=5).attach(again):  # within it, the other policy; afterwards its own again
        assert generate(again, prompt()).cache.lengths() == [5] * 4
    for other in (loaded, auto, again, copy.deepcopy(small)):
        assert torch.equal(generate(other, prompt()).sequences, out.sequences)
        assert generate(other, prompt()).cache.lengths() == [9] * 4


def test_losses_of_continuations() -> None:
    model, ids = build("llama"), prompt()
    with torch.no_grad():
        logits = model(ids).logits[:, 10:-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 11:].flatten(), reduction="none"
    ).view(2, -1)
    for policy in (None, H2O(budget=40)):
        found, _ = continuation_loss(model, ids, prompt=11, policy=policy)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    bits = bits_per_byte(model, ids, prompt=11, text_bytes=48)
    assert bits == pytest.approx(float(expected.sum()) / 48 / 0.6931472, rel=1e-4)


def test_mistakes_are_named() -> None:
    policy, model = POLICIES["a2sf"], build("llama")
    with pytest.raises(ValueError, match="no transformers model"), policy.attach(build("bert")):
        pass
    with (
        pytest.raises(ValueError, match="two caches"),
        policy.attach(model),
    ):
        generate(model, prompt(), cache_implementation="static")
    with policy.attach(model) as cache:
        pass
    with pytest.raises(RuntimeError, match="inside 'with"):
        generate(model, prompt(), cache=cache)
    with pytest.raises(ValueError, match="prompt is 23"):
        continuation_loss(model, prompt(), prompt=23)
    with policy.attach(model) as cache:
        generate(model, prompt(), cache=cache)
        with pytest.raises(ValueError, match="cannot be taken back"):
            cache.crop(-2)
