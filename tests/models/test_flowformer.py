"""The Flowformer language model: published sizes, streams, padding, packing, generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compare import assert_close
from manyheads.layers.state import state_bytes
from manyheads.models import create_model, get_variant
from manyheads.models.base import load_model
from manyheads.models.language.causal import next_token_loss
from manyheads.models.language.flowformer import FlowformerGPT, FlowformerGPTConfig


def small(**changes) -> FlowformerGPT:
    options = {
        "vocab_size": 31, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "block_size": 40
    }  # fmt: skip
    return FlowformerGPT(FlowformerGPTConfig(**(options | changes)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("flowformer-gpt2", 163_037_184),
        ("flowformer-gpt-mini", 22_164_864),
        ("flowformer_gpt_nano", 4_958_736),
    ],
)
def test_published_sizes(name, parameters) -> None:
    model = create_model(name, device="meta")
    assert model.num_parameters() == parameters
    if parameters == 163_037_184:
        head = model.get_parameter("head.weight").numel()
        assert parameters - head == pytest.approx(124.44e6, abs=5e3)


def test_wikitext_model_shares_its_embeddings() -> None:
    model = create_model("flowformer_wikitext103", device="meta")
    config = get_variant("flowformer_wikitext103").config
    assert (config.num_layers, config.embed_dim, config.num_heads) == (6, 512, 8)
    assert config.block_size == 512
    assert config.clamp == 5.0
    names = dict(model.named_parameters())
    assert "head.weight" not in names
    assert names["embed.weight"].shape == (267744, 512)


def test_initial_weights_are_the_official_ones() -> None:
    torch.manual_seed(0)
    model = small(embed_dim=96, num_layers=8)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            std = 0.02 / 4 if name.endswith("mlp.fc2.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


def test_all_ways_to_read_agree() -> None:
    """forward == update in blocks == steps, padded on either side, and packed."""
    model = small().double().eval()
    tokens = torch.randint(31, (3, 40))
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :7] = mask[1, 12:20] = False
    logits = model(tokens, mask=mask)
    first, state = model.update(tokens[:, :25], model.init_state(3), mask=mask[:, :25])
    second, state = model.update(tokens[:, 25:30], state, mask=mask[:, 25:30])
    steps = []
    for t in range(30, 40):
        out, state = model.step(tokens[:, t], state)
        steps.append(out)
    streamed = torch.cat((first, second, torch.stack(steps, 1)), 1)
    assert_close(streamed[mask], logits[mask], 1e-9)
    rows = [model(tokens[i : i + 1, mask[i]]) for i in range(3)]
    for i, row in enumerate(rows):
        assert_close(logits[i : i + 1, mask[i]], row, 1e-9)
    packed = torch.cat([tokens[i, mask[i]] for i in range(3)])[None]
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert_close(model(packed, cu_seqlens=borders), torch.cat(rows, 1), 1e-9)


def test_generation_is_greedy_forward_at_constant_memory() -> None:
    model = small().eval()
    prompt = torch.randint(31, (2, 9))
    tokens = prompt
    for token in model.generate(prompt, max_new_tokens=20, temperature=0, prefill_block=4):
        assert torch.equal(model(tokens)[:, -1].argmax(-1), token)
        tokens = torch.cat((tokens, token[:, None]), 1)
    assert tokens.shape == (2, 29)
    sizes = set()
    state = model.init_state(2)
    for t in range(29):
        _, state = model.step(tokens[:, t], state)
        sizes.add(state_bytes(state))
    assert len(sizes) == 1


def test_prompts_of_different_lengths() -> None:
    model = small().eval()
    prompt = torch.randint(31, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :5] = False
    both = torch.stack(list(model.generate(prompt, max_new_tokens=8, mask=mask, temperature=0)))
    alone = torch.stack(list(model.generate(prompt[1:, 5:], max_new_tokens=8, temperature=0)))
    assert torch.equal(both[:, 1], alone[:, 0])


def test_the_positions_end_at_block_size() -> None:
    model = small().eval()
    tokens = torch.randint(31, (1, 41))
    with pytest.raises(ValueError, match="length 41 is more than block_size 40"):
        model(tokens)
    mask = torch.ones(1, 41, dtype=torch.bool)
    mask[0, 0] = False
    assert model(tokens, mask=mask).shape == (1, 41, 31)
    _, state = model.update(tokens[:, :40], model.init_state(1))
    with pytest.raises(ValueError, match="block_size 40"):
        model.step(tokens[:, 40], state)
    with pytest.raises(ValueError, match="block_size 40"):
        model.update(tokens[:, 40:], state)
    with pytest.raises(ValueError, match="need 41 positions, block_size is 40"):
        model.generate(tokens[:, :30], max_new_tokens=12)
    assert len(list(model.generate(tokens[:, :30], max_new_tokens=11))) == 11


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_official_weights_and_folders_go_both_ways(tmp_path, tie_embeddings) -> None:
    model, other = small(tie_embeddings=tie_embeddings).eval(), small(tie_embeddings=tie_embeddings)
    tokens = torch.randint(31, (1, 20))
    other.load_official(model.to_official()).eval()
    assert torch.equal(other(tokens), model(tokens))
    model.save(tmp_path)
    assert torch.equal(load_model(tmp_path).eval()(tokens), model(tokens))


def test_official_options() -> None:
    nano = FlowformerGPTConfig.from_official({"model_type": "flowformer-gpt-nano", "n_layer": 2})
    assert nano == get_variant("flowformer_gpt_nano").config.replace(num_layers=2)
    with pytest.raises(ValueError, match="did you mean 'n_layer'"):
        FlowformerGPTConfig.from_official({"n_layers": 2})
    with pytest.raises(ValueError, match="did you mean 'flowformer-gpt2'"):
        FlowformerGPTConfig.from_official({"model_type": "flowformer-gpt3"})


def test_it_learns_and_compiles() -> None:
    model = small(dropout=0.0, attention_dropout=0.0)
    tokens = torch.randint(31, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tokens), model(tokens), 1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = next_token_loss(model(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_dropout_places() -> None:
    model = small(dropout=0.3, attention_dropout=0.2)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3, 0.2}
    assert not torch.equal(model(torch.zeros(1, 9).long()), model(torch.zeros(1, 9).long()))
