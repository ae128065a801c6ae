"""Which of an encoder's positions stay: against the definition, and on a tiny Whisper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.families import VOCAB, batches, build
from manyheads.attention.softmax import softmax_weights
from manyheads.compress import get_procedure
from manyheads.compress.a2sf import A2SF, H2O, CrossState, SinkRecent, SnapKV, StreamingLLM
from manyheads.compress.files import load_model, save_model

POLICIES = {
    "a2sf": A2SF(cross_budget=5, alpha=0.6),
    "h2o": H2O(cross_budget=0.25),
    "snapkv": SnapKV(cross_budget=5, window=4, pool=3),
    "both": A2SF(cross_budget=5, alpha=0.6, budget=9, recent=3),
    "early": H2O(cross_budget=5, cross_after=1),
}


def definition(name: str, rows: Tensor) -> Tensor:
    """The positions kept, (B, G, 5), of attention rows (B, G, tokens, n): six are the prompt."""
    if name == "snapkv":
        sums = rows[:, :, 2:6].sum(2)
        sums = torch.nn.functional.max_pool1d(sums, 3, 1, 1)
    elif name in ("a2sf", "both"):
        sums = sum(0.6 ** (7 - q) * rows[:, :, q] for q in range(8))
    else:
        sums = rows[:, :, : 6 if name == "early" else 8].sum(2)
    # Smoothing makes equals, of which the first stay.
    return sums.sort(stable=True, descending=True, dim=-1).indices[..., :5].sort(-1).values


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("with_rows", [False, True])
def test_positions_stay_by_the_definition(policy: str, with_rows: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(3, 4, 9, 10),
        torch.randn(3, 2, 20, 10),
        torch.randn(3, 2, 20, 7),
    )
    weights = softmax_weights(3 * query, key)
    grouped = weights.unflatten(1, (2, 2)).sum(2)
    state = CrossState(POLICIES[policy])
    first = state.append(key, value)
    assert first[0] is key
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 9)):
        keys = state.read("key")
        assert keys is not None
        decided = {"snapkv": 6, "early": 6}.get(policy, 8) <= start
        assert state.is_decided == decided
        assert keys.shape[2] == (5 if decided else 20)
        rows = weights[:, :, start:stop] if with_rows and not decided else None
        part = 3 * query[:, :, start:stop]
        state.settle(part, keys, scale=10**-0.5, rows=rows)
    kept = definition(policy, grouped)
    assert state.held is not None
    assert torch.equal(state.held["position"].long(), kept)
    for name, whole in (("key", key), ("value", value)):
        expected = whole.take_along_dim(kept[..., None], 2)
        assert torch.equal(state.read(name), expected)  # type: ignore[arg-type]
        assert state.read(name).untyped_storage().nbytes() == 4 * expected.numel()  # type: ignore[union-attr]
    assert "score" not in state.held.tensors
    with pytest.raises(RuntimeError, match="filled once"):
        state.append(key, value)


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_of_the_prompt_counts_for_nothing(policy: str) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 2, 14, 10), torch.randn(2, 2, 20, 10)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, :3] = False
    both, alone = CrossState(POLICIES[policy]), CrossState(POLICIES[policy])
    both.append(key, key)
    alone.append(key[1:], key[1:])
    both.settle(query[:, :, :6], key, real=real)
    alone.settle(query[1:, :, 3:6], key[1:])
    for t in range(6, 12):  # the padded row has read eight of them after the eleventh
        keys = both.read("key")
        assert keys is not None
        both.settle(query[:, :, t : t + 1], keys)
        alone.settle(query[1:, :, t : t + 1], keys[1:])
        assert both.is_decided == alone.is_decided
    assert both.held is not None
    assert alone.held is not None
    assert both.is_decided
    assert torch.equal(both.held["position"][1:], alone.held["position"])


def whisper(attention: str = "sdpa") -> Any:
    pytest.importorskip("transformers")
    model: Any = build("whisper")
    for layer in model.model.decoder.layers:  # so that it matters who is attended to
        layer.encoder_attn.q_proj.weight.data *= 25
    model.set_attn_implementation(attention)
    return model


def mels(rows: int = 3) -> Tensor:
    return batches("whisper", count=1)[0]["input_features"][:rows]


def generate(model: Any, sound: Tensor, *, count: int = 12, **options: Any) -> Any:
    from transformers import GenerationMixin

    start = torch.randint(3, VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))
    given = {"decoder_input_ids": start[: len(sound)]} | options
    return GenerationMixin.generate(
        model, input_features=sound, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **given,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("policy", ["a2sf", "h2o", "snapkv"])
def test_whisper_reads_what_was_kept_and_no_more(policy: str, attention: str) -> None:
    """The same tokens in one pass without a cache, where a mask hides what is gone."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.models.whisper.modeling_whisper import eager_attention_forward

    model = whisper(attention)
    with POLICIES[policy].attach(model) as cache:
        found = generate(model, mels(), cache=cache)
    heard = cache.cross_attention_cache
    assert heard.lengths() == [5] * 4
    tokens, decided = found.sequences[:, :-1], 6 if policy == "snapkv" else 8
    crosses = {layer.encoder_attn: i for i, layer in enumerate(model.model.decoder.layers)}
    checked = []

    def hidden(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        if module not in crosses:
            return eager_attention_forward(module, query, key, value, mask, **options)
        full = (query @ key.mT).softmax(-1)
        kept = heard.positions(crosses[module]).long()
        assert torch.equal(kept, definition(policy, full))
        checked.append(module)
        allowed = torch.zeros(3, 4, 20, dtype=torch.bool).scatter(-1, kept, True)
        allowed = allowed[:, :, None].expand(-1, -1, query.shape[2], -1).clone()
        allowed[:, :, :decided] = True
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)
        return eager_attention_forward(module, query, key, value, bias, **options)

    AttentionInterface.register("hidden_positions", hidden)
    AttentionMaskInterface.register("hidden_positions", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation("hidden_positions")
    with torch.no_grad():
        expected = model(input_features=mels(), decoder_input_ids=tokens).logits[:, 5:]
    assert len(checked) == 4
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation(attention)
    plain = generate(model, mels())
    assert (torch.stack(plain.logits, 1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("beams", [1, 3])
def test_what_holds_all_changes_no_bit(beams: int) -> None:
    model = whisper()
    plain = generate(model, mels(), num_beams=beams)
    for policy in (
        A2SF(cross_budget=20),
        A2SF(cross_budget=1.0, budget=40),
        SnapKV(cross_budget=99),
    ):
        with policy.attach(model) as cache:
            ours = generate(model, mels(), num_beams=beams, cache=cache)
        assert torch.equal(plain.sequences, ours.sequences)
        assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))
        assert cache.cross_attention_cache.lengths() == [20] * 4


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_beams_and_bytes(policy: str) -> None:
    model = whisper()
    with POLICIES[policy].attach(model) as cache:
        whole = generate(model, mels(), cache=cache)
        # Eight numbers of a key and as many of a value, and a position, for each of four heads.
        assert cache.cross_attention_cache.nbytes == 4 * 3 * 4 * 5 * (2 * 8 * 4 + 4)
        for row in range(3):
            start = whole.sequences[row : row + 1, :6]
            alone = generate(model, mels()[row : row + 1], decoder_input_ids=start)
            assert torch.equal(alone.sequences[0], whole.sequences[row])
        beams = generate(model, mels(), num_beams=3, cache=None)
        heard = beams.cache.cross_attention_cache
        assert heard.lengths() == [5] * 4
        before = [heard.positions(layer).clone() for layer in range(4)]
        order = torch.tensor([3, 3, 0, 1, 2, 5, 8, 7, 6])
        beams.cache.reorder_cache(order)
        for layer in range(4):
            assert torch.equal(heard.positions(layer), before[layer][order])
    said = cache.self_attention_cache.lengths()
    assert said == ([9] * 4 if policy == "both" else [17] * 4)
    assert len(generate(model, mels()).cache.cross_attention_cache.layers[0].keys[0, 0]) == 20


def test_int8_holds_a_quarter() -> None:
    model = whisper()
    plain = generate(model, mels())
    for budget in (20, 5):
        with A2SF(cross_budget=budget, bits=8).attach(model) as cache:
            ours = generate(model, mels(), cache=cache)
        held = cache.cross_attention_cache.layers[0].state.held
        assert held["key"].dtype == torch.int8
        assert cache.cross_attention_cache.layers[0].keys.dtype == torch.float32
        if budget == 20:
            error = (plain.logits[1] - ours.logits[1]).square().mean().sqrt()
            assert 0 < error < 0.05 * plain.logits[1].square().mean().sqrt()


def test_a_plan_keeps_it(tmp_path: Any) -> None:
    model = whisper()
    for budget in (5, 0.25):
        plan = get_procedure("a2sf")(cross_budget=budget, alpha=0.6).plan(model, [])
        small: Any = plan.apply(model)
        out = generate(small, mels())
        assert out.cache.cross_attention_cache.lengths() == [5] * 4
        folder = tmp_path / str(budget)
        loaded = load_model(save_model(small, folder))
        assert torch.equal(generate(loaded, mels()).sequences, out.sequences)
        assert load_model(folder).config.model_type == "whisper"


def test_mistakes_are_named() -> None:
    for policy in (SinkRecent, StreamingLLM):
        with pytest.raises(ValueError, match="use a2sf, h2o or snapkv"):
            policy(budget=9, cross_budget=5)
    for wrong in (0, -1, 1.5):
        with pytest.raises(ValueError, match="cross_budget is"):
            A2SF(cross_budget=wrong)
    with pytest.raises(ValueError, match="cross_after is 0"):
        A2SF(cross_budget=5, cross_after=0)
    with pytest.raises(ValueError, match="or cross_budget alone"):
        A2SF()
    for family in ("llama", "ours"):
        model = build(family)
        with (
            pytest.raises(ValueError, match="encoder"),
            A2SF(budget=9, cross_budget=5).attach(model),
        ):
            pass
    model = whisper()
    with A2SF(cross_budget=5).attach(model) as cache, pytest.raises(ValueError, match="empty"):
        cache.cross_attention_cache.positions(0)
