"""MixerLM: patterns, streaming through mixed layers, padding, packing, generation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close
from manyheads.layers.state import reorder_state, state_bytes
from manyheads.models import load_model
from manyheads.models.language.causal import next_token_loss, sample_token
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.models.language.pattern import parse_pattern
from manyheads.registry import get_mechanism, list_mechanisms

CAUSAL = [n for n in list_mechanisms() if get_mechanism(n).causal]
PATTERNS = [f"{n}*2" for n in CAUSAL] + ["gla*3,softmax", ",".join(CAUSAL)]


def build(pattern: str, **options) -> MixerLM:
    config = MixerLMConfig(vocab_size=50, embed_dim=60, num_heads=3, mixers=pattern, **options)
    return MixerLM(config).eval().double()


def test_positions_do_not_drown_the_tokens() -> None:
    model = MixerLM(MixerLMConfig(embed_dim=128, mixers="flow*2", add_positions=True))
    alone = model.embed.weight.detach()
    tokens = torch.zeros(1, 500, dtype=torch.long)
    seen = model._embed(tokens, torch.arange(500)[None]).detach() - alone[0]
    ratio = seen.square().mean().sqrt() / alone.square().mean().sqrt()
    assert 1 < ratio < 5


def test_patterns() -> None:
    assert parse_pattern("gla*2, softmax") == ("gla", "gla", "softmax")
    assert parse_pattern(("gla", "softmax"), 4) == ("gla", "softmax") * 2
    for wrong, match in (("gla*0", "gla\\*0"), ("gla**2", "layer pattern"), ("glaa", "gla")):
        with pytest.raises(ValueError, match=match):
            parse_pattern(wrong)
    with pytest.raises(ValueError, match="num_layers 5"):
        parse_pattern("gla,softmax", 5)
    with pytest.raises(ValueError, match="does not use"):
        MixerLMConfig(mixers="gla", mixer_options={"softmax": {}})


@given(st.lists(st.tuples(st.sampled_from(CAUSAL), st.integers(1, 4)), min_size=1, max_size=5))
def test_any_pattern_is_read_back(items) -> None:
    text = ", ".join(f"{name}*{count}" for name, count in items)
    assert parse_pattern(text) == tuple(n for n, c in items for _ in range(c))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_steps_are_the_whole(pattern) -> None:
    model = build(pattern)
    tokens = torch.randint(50, (3, 71))
    mask = torch.ones(3, 71, dtype=torch.bool)
    mask[0, :9] = mask[1, :3] = False
    with torch.no_grad():
        whole = model(tokens, mask=mask)
        first, state = model.update(tokens[:, :30], model.init_state(3), mask=mask[:, :30])
        second, state = model.update(tokens[:, 30:60], state)
        steps = []
        for t in range(60, 71):
            if t == 65:
                order = torch.tensor([1, 0, 2])
                state = reorder_state(reorder_state(state, order), order)
            logits, state = model.step(tokens[:, t], state)
            steps.append(logits)
    streamed = torch.cat((first, second, torch.stack(steps, 1)), 1)
    assert_close(streamed[mask], whole[mask], 1e-8)
    assert state.position.tolist() == [62, 68, 71]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_rows_do_not_meet(pattern) -> None:
    model = build(pattern)
    tokens = torch.randint(50, (1, 64))
    packed = model(tokens, cu_seqlens=torch.tensor([0, 20, 21, 64]))
    for a, b in ((0, 20), (20, 21), (21, 64)):
        assert_close(packed[:, a:b], model(tokens[:, a:b]), 1e-8)


def test_memory_of_generation_is_constant_without_softmax() -> None:
    constant = [n for n in CAUSAL if get_mechanism(n).constant_state]
    model = build(",".join(constant))
    sizes = []
    with torch.no_grad():
        for length in (200, 400):
            _, state = model.update(torch.randint(50, (1, length)), model.init_state(1))
            sizes.append(state_bytes(state))
    assert sizes[0] == sizes[1]


@settings(max_examples=5, deadline=None)
@given(block=st.integers(1, 40))
def test_greedy_generation_is_the_argmax_of_the_whole(block) -> None:
    model = build("gla,softmax")
    prompt = torch.randint(50, (2, 23))
    mask = torch.ones(2, 23, dtype=torch.bool)
    mask[1, :8] = False
    made = list(
        model.generate(prompt, max_new_tokens=6, mask=mask, temperature=0, prefill_block=block)
    )
    tokens = torch.cat((prompt, torch.stack(made, 1)), 1)
    full = torch.cat((mask, torch.ones(2, 6, dtype=torch.bool)), 1)
    with torch.no_grad():
        expected = model(tokens, mask=full)[:, 22:-1].argmax(-1)
    assert torch.equal(torch.stack(made, 1), expected)
    alone = model.generate(prompt[1:, 8:], max_new_tokens=6, temperature=0)
    assert torch.equal(torch.cat(list(alone)), torch.stack(made, 1)[1])


def test_sampling_keeps_to_its_bounds() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(500, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample_token(logits, top_k=2, generator=generator).tolist()) == {2, 3}
    assert set(sample_token(logits, top_p=0.6, generator=generator).tolist()) == {3}
    assert set(sample_token(logits, generator=generator).tolist()) == {0, 1, 2, 3}
    assert sample_token(logits, temperature=0).unique().item() == 3
    for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            sample_token(logits, **wrong)
    model = build("gla")
    right = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="left"):
        next(model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=1, mask=right))
    with pytest.raises(ValueError, match="length >= 1"):
        next(model.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1))


def test_loss_leaves_out_what_is_not_real() -> None:
    logits, tokens = torch.randn(2, 10, 50), torch.randint(50, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    other = tokens.clone()
    other[1, 6:] = 0
    assert next_token_loss(logits, tokens, mask) == next_token_loss(logits, other, mask)
    assert next_token_loss(logits, tokens) != next_token_loss(logits, tokens, mask)


@pytest.mark.parametrize("tied", [True, False])
def test_saved_is_loaded(tmp_path, tied) -> None:
    model = build("gla,softmax", tie_embeddings=tied).float()
    model.save(tmp_path / "run")
    loaded = load_model(tmp_path / "run").eval()
    tokens = torch.randint(50, (1, 20))
    assert isinstance(loaded, MixerLM)
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))
    assert loaded.num_parameters() == model.num_parameters()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path)
