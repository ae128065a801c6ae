"""Landmark language models: sizes, streams, generation, files of weights."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.attention import insert_landmarks, strip_landmarks
from manyheads.models import create_model, load_model
from manyheads.models.language.causal import next_token_loss
from manyheads.models.language.landmark import (
    LandmarkGPT,
    LandmarkGPTConfig,
    LandmarkLlama,
    LandmarkLlamaConfig,
    add_token,
    apply_weight_diff,
)

SIZES = {
    "vocab_size": 31, "landmark_id": 30, "embed_dim": 24, "num_layers": 2, "num_heads": 3,
    "freq": 4, "train_context": 60,
}  # fmt: skip


def build(kind: str, **options):
    if kind == "gpt":
        return LandmarkGPT(LandmarkGPTConfig(**(SIZES | options))).eval()
    return LandmarkLlama(LandmarkLlamaConfig(**(SIZES | {"mlp_width": 40} | options))).eval()


@pytest.mark.parametrize(
    ("name", "count"), [("landmark_gpt", 202_531_840), ("landmark_llama_7b", 6_738_423_808)]
)
def test_published_sizes(name, count) -> None:
    assert create_model(name, device="meta").num_parameters() == count


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_stream_with_all_blocks_equals_the_whole(kind) -> None:
    model = build(kind, train_context=1000).double()
    ids = torch.randint(30, (2, 50))
    with torch.no_grad():
        whole = strip_landmarks(model(insert_landmarks(ids, 4, 30)), 4)
        state, parts = model.init_state(2, top_k=20), []
        for part in ids.split([7, 20, 1, 3, 18, 1], 1):
            logits, state = model.update(part, state)
            parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, 1e-5)
    last, _ = model.step(ids[:, 0], state)
    assert last.shape == (2, 31)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_landmarks_may_come_with_the_tokens(kind) -> None:
    model = build(kind, train_context=1000)
    ids = torch.randint(30, (2, 90))
    marked = insert_landmarks(ids, 4, 30)
    plain, _ = model.update(ids, model.init_state(2, top_k=30))
    state, parts = model.init_state(2, top_k=30), []
    # The cut lies between a block's last token and its landmark.
    for part in (marked[:, :44], marked[:, 44:]):
        logits, state = model.update(part, state, with_landmarks=True)
        parts.append(logits)
    assert_close(strip_landmarks(torch.cat(parts, 1), 4), plain, 1e-5)
    _, state = model.update(marked[:, :4], model.init_state(2), with_landmarks=True)
    with pytest.raises(ValueError, match="lacks its landmark"):
        model.update(ids[:, :2], state)
    _, state = model.update(marked[:, 4:9], state, with_landmarks=True)
    with pytest.raises(ValueError, match="insert_landmarks"):
        model.update(marked[:, 4:9], model.init_state(2), with_landmarks=True)


def test_a_long_prompt_is_read_in_chunks_that_fit() -> None:
    model = build("gpt")
    assert model.chunk_length(2) == 45
    prompt = torch.randint(30, (2, 500))
    tokens = list(model.generate(prompt, max_new_tokens=9, temperature=0))
    assert len(tokens) == 9
    state = model.init_state(2)
    model.update(prompt, state)
    assert state.layers[0].stored == 125
    with pytest.raises(ValueError, match="top_k 11"):
        model.update(prompt, model.init_state(2, top_k=11))


def test_layers_keep_files_of_their_own(tmp_path) -> None:
    model = build("llama", num_kv_heads=1)
    ids = torch.randint(30, (1, 100))
    in_files, _ = model.update(ids, model.init_state(1, path=tmp_path, capacity=30))
    in_memory, _ = model.update(ids, model.init_state(1))
    assert_close(in_files, in_memory, 1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_padding_and_packing_change_nothing(kind) -> None:
    model = build(kind).double()
    tokens, mask = torch.randint(31, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
    mask[0, :9] = mask[1, 25:] = False
    with torch.no_grad():
        logits = model(tokens, mask=mask)
        rows = [model(tokens[i : i + 1, mask[i]]) for i in range(2)]
        for i, row in enumerate(rows):
            assert_close(logits[i : i + 1, mask[i]], row, 1e-9)
        packed = torch.cat([tokens[i, mask[i]] for i in range(2)])[None]
        borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
        assert_close(model(packed, cu_seqlens=borders), torch.cat(rows, 1), 1e-9)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_every_weight_trains_and_files_come_back(kind, tmp_path) -> None:
    model = build(kind).train()
    tokens = insert_landmarks(torch.randint(30, (2, 40)), 4, 30)
    next_token_loss(model(tokens), tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    model.save(tmp_path)
    assert_close(load_model(tmp_path)(tokens), model.eval()(tokens), 1e-7)
    other = build(kind).load_official(model.to_official())
    assert_close(other(tokens), model(tokens), 1e-7)


def test_gpt_with_biases_goes_both_ways() -> None:
    model = build("gpt", bias=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    official = model.to_official()
    assert official["transformer.h.1.attn.c_attn.bias"].shape == (72,)
    tokens = torch.randint(31, (1, 20))
    assert_close(build("gpt", bias=True).load_official(official)(tokens), model(tokens), 1e-7)


def test_weights_from_a_base_and_a_difference() -> None:
    base = build("llama", vocab_size=30, landmark_id=29).to_official()
    tuned = build("llama").to_official()
    grown = add_token(base)
    mean = base["lm_head.weight"].mean(0)
    torch.testing.assert_close(grown["lm_head.weight"][-1], mean)
    diff = {k: tuned[k] - grown[k] for k in tuned}
    recovered = apply_weight_diff(base, diff)
    tokens = torch.randint(31, (1, 20))
    model = build("llama").load_official(recovered)
    assert_close(model(tokens), build("llama").load_official(tuned)(tokens), 1e-5)
    del diff["model.norm.weight"]
    diff["model.layers.0.mlp.up_proj.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"(?s)no 'model.norm.weight'.*up_proj"):
        apply_weight_diff(base, diff)
    with pytest.raises(ValueError, match="count -1"):
        add_token(base, count=-1)


def test_official_configs_are_strict() -> None:
    with pytest.raises(ValueError, match="n_embd"):
        LandmarkGPTConfig.from_official({"n_embed": 3})
    with pytest.raises(ValueError, match="softmax_func"):
        LandmarkGPTConfig.from_official({"softmax_func": "nomem"})
    official = {"group_dropout": 0.1, "pos_jump_on_mem": 9, "positional_encoder": "rotary_mem_jump"}
    config = LandmarkGPTConfig.from_official(official)
    assert (config.group_dropout, config.pos_jump) == (0.1, 9)
    official |= {"positional_encoder": "rotary", "group_dropout": None}
    config = LandmarkGPTConfig.from_official(official)
    assert (config.group_dropout, config.pos_jump) == (0.0, 0)
    with pytest.raises(ValueError, match="hidden_size"):
        LandmarkLlamaConfig.from_official({"hidden_sizes": 3})
    with pytest.raises(ValueError, match="silu"):
        LandmarkLlamaConfig.from_official({"hidden_act": "gelu"})
    config = LandmarkLlamaConfig.from_official({"vocab_size": 32001, "mem_freq": 63})
    assert (config.landmark_id, config.block_size) == (32000, 64)
    with pytest.raises(ValueError, match="landmark_id 31"):
        LandmarkGPTConfig(**(SIZES | {"landmark_id": 31}))
    with pytest.raises(ValueError, match="freq 0"):
        LandmarkGPTConfig(**(SIZES | {"freq": 0}))
    model = build("gpt")
    mask = torch.tensor([[False, True]])
    with pytest.raises(ValueError, match="padding"):
        model.update(torch.tensor([[1, 2]]), model.init_state(1), mask=mask)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_a_landmark_is_never_generated(kind) -> None:
    model = build(kind)
    head = torch.nn.Linear(24, 31).requires_grad_(False)
    head.bias.zero_()[30] = 1e3
    model.head = head
    assert model(torch.zeros(1, 3, dtype=torch.long)).argmax(-1).unique().tolist() == [30]
    tokens = torch.stack(
        list(model.generate(torch.zeros(2, 7, dtype=torch.long), max_new_tokens=9))
    )
    assert tokens.shape == (9, 2)
    assert int(tokens.max()) < 30


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("option", [{"group_dropout": 0.5}, {"pos_jump": 20}])
def test_extras_of_training_are_seeded_and_off_elsewhere(kind, option) -> None:
    plain = build(kind)
    model = build(kind, **option)
    model.load_state_dict(plain.state_dict())
    tokens = insert_landmarks(torch.randint(30, (2, 50)), 4, 30)
    wanted = plain(tokens).detach()
    assert_close(model(tokens), wanted, 1e-6)
    model.train()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(model(tokens))
    assert torch.equal(drawn[0], drawn[1])
    for other in (wanted, drawn[2]):
        assert float((drawn[0] - other).detach().abs().max()) > 1e-5
    # Nothing precedes the first block.
    assert_close(drawn[0][:, :5], wanted[:, :5], 1e-6)
    drawn[0].square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    with pytest.raises(ValueError, match=next(iter(option))):
        build(kind, **dict.fromkeys(option, -1))
