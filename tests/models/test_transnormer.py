"""The TransNormer language model: sizes, streaming, padding, options, training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compare import assert_close, relative_error
from manyheads.layers.state import state_bytes
from manyheads.models import create_model
from manyheads.models.language.causal import next_token_loss
from manyheads.models.language.transnormer import TransNormerLM, TransNormerLMConfig
from manyheads.models.language.transnormer_blocks import fairseq_places, fairseq_sinusoidal


def build(**options) -> TransNormerLM:
    values = {
        "vocab_size": 31, "embed_dim": 24, "num_layers": 4, "num_heads": 3, "block_size": 8
    } | options  # fmt: skip
    return TransNormerLM(TransNormerLMConfig(**values)).eval()


@pytest.mark.parametrize("name", ["transnormer_t1", "transnormer_t2", "lm_t2_wikitext103"])
def test_published_sizes(name) -> None:
    model = create_model(name, device="meta")
    assert model.num_parameters() == 155_988_540
    assert [b.mixer.mechanism for b in model.layers] == ["diag"] * 3 + ["norm"] * 3
    assert model.config.width == 1365


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_equals_the_whole(data) -> None:
    """Padding ids among the tokens included, which are read as published without a mask."""
    variant = data.draw(st.sampled_from(["t1", "t2"]))
    torch.manual_seed(data.draw(st.integers(0, 9)))
    model = build(variant=variant, respect_padding=data.draw(st.booleans())).double()
    tokens = torch.randint(31, (2, 40))
    tokens[torch.rand(2, 40) < 0.2] = model.config.padding_idx
    with torch.no_grad():
        whole, state, parts, at = model(tokens), model.init_state(2), [], 0
        while at < 40:
            size = min(data.draw(st.integers(0, 15)), 40 - at)
            if size == 0:
                out, state = model.step(tokens[:, at], state)
                parts, at = [*parts, out[:, None]], at + 1
            else:
                out, state = model.update(tokens[:, at : at + size], state)
                parts, at = [*parts, out], at + size
    streamed = torch.cat(parts, 1)
    if model.config.respect_padding:
        real = tokens != model.config.padding_idx
        assert_close(streamed[real], whole[real], 1e-9)
    else:
        assert_close(streamed, whole, 1e-9)


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_padding_packing_and_the_future_change_nothing(variant) -> None:
    model = build(variant=variant).double()
    tokens, mask = torch.randint(2, 31, (3, 30)), torch.ones(3, 30, dtype=torch.bool)
    mask[0, :9] = False
    mask[1, 22:] = False
    mask[2, [0, 10, 29]] = False
    with torch.no_grad():
        logits = model(tokens, mask=mask)
        rows = [model(tokens[i : i + 1, mask[i]]) for i in range(3)]
        for i, row in enumerate(rows):
            assert_close(logits[i : i + 1, mask[i]], row, 1e-9)
        packed = torch.cat([tokens[i, mask[i]] for i in range(3)])[None]
        borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
        assert_close(model(packed, cu_seqlens=borders), torch.cat(rows, 1), 1e-9)
        later = tokens.clone()
        later[:, 17:] = torch.randint(2, 31, (3, 13))
        assert_close(model(later)[:, :17], model(tokens)[:, :17], 1e-12)


def test_padding_ids_take_part_unless_they_are_to_be_respected() -> None:
    tokens = torch.randint(2, 31, (1, 20))
    tokens[0, 5:8] = 1
    published, respectful = build(), build(respect_padding=True)
    respectful.load_state_dict(published.state_dict())
    with torch.no_grad():
        published.embed.weight[1] = 3.0
        respectful.embed.weight[1] = 3.0
        after = published(tokens)[:, 8:]
        shorter = torch.cat((tokens[:, :5], tokens[:, 8:]), 1)
        assert_close(respectful(tokens)[:, 8:], published(shorter)[:, 5:], 1e-5)
        assert_close(respectful(tokens), published(tokens, mask=tokens != 1), 1e-6)
        assert relative_error(after, respectful(tokens)[:, 8:]) > 1e-2


def test_fairseq_positions_start_behind_the_padding_index() -> None:
    tokens = torch.tensor([[1, 1, 7, 8, 1, 9]])
    assert fairseq_places(tokens, 1).tolist() == [[1, 1, 2, 3, 1, 4]]
    before = torch.tensor([10])
    assert fairseq_places(tokens, 1, before=before).tolist() == [[1, 1, 12, 13, 1, 14]]
    vectors = fairseq_sinusoidal(torch.tensor([[1, 2]]), 6, 1)
    angle = 2 * torch.tensor([1.0, 0.01, 0.0001])
    torch.testing.assert_close(vectors[0, 1], torch.cat((angle.sin(), angle.cos())))
    assert (vectors[0, 0] == 0).all()
    assert fairseq_sinusoidal(torch.tensor([[5]]), 7, 1)[0, 0, 6] == 0


def test_memory_while_generating_is_constant() -> None:
    model = build()
    state, sizes = model.init_state(2), set()
    with torch.inference_mode():
        for _ in range(40):
            _, state = model.step(torch.randint(2, 31, (2,)), state)
            sizes.add(state_bytes(state))
    assert len(sizes) == 1
    prompt = torch.randint(2, 31, (2, 30))
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :11] = False
    together = torch.stack(list(model.generate(prompt, max_new_tokens=5, mask=mask, temperature=0)))
    alone = list(model.generate(prompt[:1, 11:], max_new_tokens=5, temperature=0, prefill_block=4))
    assert torch.equal(together[:, 0], torch.cat(alone))


def test_options_change_what_they_name() -> None:
    tokens = torch.randint(2, 31, (1, 40))
    model = build()
    for options in (
        {"variant": "t2"},
        {"activation": "silu"},
        {"block_size": 16},
        {"eps": 1.0},
        {"layer_types": ("norm", "diag", "norm", "diag")},
    ):
        other = build(**options)
        other.load_state_dict(model.state_dict())
        assert relative_error(other(tokens), model(tokens)) > 1e-3, options
    assert build(mlp_width=10).layers[0].mlp.up_proj.out_features == 10


def test_blocks_are_local_and_later_layers_are_not() -> None:
    tokens = torch.randint(2, 31, (1, 24))
    other = tokens.clone()
    other[0, 1] = (other[0, 1] - 1) % 29 + 2
    for kind in ("diag", "norm"):
        model = build(layer_types=(kind, kind), num_layers=2)
        changed = (model(tokens) != model(other)).any(-1)[0]
        assert changed[1:8].all()
        assert bool(changed[8:].any()) == (kind == "norm")


@pytest.mark.parametrize("variant", ["t1", "t2"])
def test_it_trains(variant) -> None:
    model = build(variant=variant, dropout=0.0).train()
    assert isinstance(model.dropout, nn.Dropout)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.arange(2, 26).repeat(4, 2)
    losses = []
    for _ in range(25):
        loss = next_token_loss(model(tokens), tokens)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    trained = {k for k, p in model.named_parameters() if p.grad is not None}
    left = {k for k, _ in model.named_parameters()} - trained
    assert left == {f"layers.{i}.mixer.lrpe.v" for i in range(4)}, "all but the fixed vectors"
    assert model.embed.weight.shape[0] == 31


def test_official_names_with_and_without_the_prefix(tmp_path) -> None:
    model, other = build(), build()
    official = model.to_official()
    assert "output_projection.weight" in official
    tokens = torch.randint(2, 31, (1, 20))
    for weights in (official, {f"decoder.{k}": t for k, t in official.items()}):
        other.load_official(weights)
        assert torch.equal(other(tokens), model(tokens))
    with pytest.raises(ValueError, match="embed_tokens"):
        other.load_official({k: t for k, t in official.items() if "embed_tokens" not in k})
    untied = official | {"output_projection.weight": official["output_projection.weight"] + 1}
    with pytest.raises(ValueError, match="tied"):
        other.load_official(untied)
    model.save(tmp_path)
    assert torch.equal(TransNormerLM.load(tmp_path).eval()(tokens), model(tokens))


def test_it_compiles_without_graph_breaks() -> None:
    model, tokens = build(num_layers=2), torch.randint(31, (2, 20))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = next_token_loss(compiled(tokens), tokens)
    loss.backward()
    assert_close(loss, next_token_loss(model(tokens), tokens), 1e-5)


def test_errors_name_the_fix() -> None:
    for options, reason in (
        ({"padding_idx": 40}, "padding_idx 40"),
        ({"layer_types": ("diag", "norms", "norm", "norm")}, "'norm'"),
        ({"layer_types": ("diag",)}, "num_layers is 4"),
        ({"activation": "silo"}, "silu"),
        ({"variant": "t4"}, "t4"),
        ({"num_heads": 5}, "num_heads 5"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(**options)
