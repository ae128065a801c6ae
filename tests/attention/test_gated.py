"""Clipped softmax and gated attention beyond the contract: exact zeros, gates of all kinds."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.attention import (
    ClippedSoftmaxAttention,
    ClippedSoftmaxConfig,
    GatedAttention,
    GatedConfig,
    HeadGate,
    clip_softmax,
    clipped_softmax,
    clipped_softmax_reference,
    clipped_softmax_weights,
    gated,
    softmax,
)
from manyheads.attention.urpe import blocks as cut
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.models.language.quantizable import QuantizableOPT, QuantizableOPTConfig


def draw(batch=2, heads=4, kv_heads=2, length=63, dim=20, value=12):
    q = torch.randn(batch, heads, length, dim).double()
    k = torch.randn(batch, kv_heads, length, dim).double()
    return q, k, torch.randn(batch, kv_heads, length, value).double()


def test_small_weights_are_exactly_zero_and_get_no_gradient() -> None:
    scores = torch.randn(3, 41).double().requires_grad_()
    gamma, eta = -0.03, 1.01
    y = clip_softmax(scores, gamma=gamma, eta=eta)
    p = scores.detach().softmax(-1)
    below = p < -gamma / (eta - gamma)
    assert below.any()
    assert not below.all()
    assert torch.equal(y.detach() == 0, below)
    # The gradient with respect to the softmax itself: 0 where clipped, eta − gamma elsewhere.
    leaf = p.clone().requires_grad_()
    (((eta - gamma) * leaf + gamma).clamp(0, 1)).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad == 0, below)
    torch.testing.assert_close(leaf.grad[~below], torch.full_like(leaf.grad[~below], eta - gamma))


@pytest.mark.parametrize("numbers", [1 << 19, 70], ids=["one block", "many blocks"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("gamma", "eta"), [(-0.03, 1.0), (0.0, 1.1), (-0.1, 1.05), (0.0, 1.0)])
def test_blocks_equal_the_matrix(monkeypatch, numbers, is_causal, gamma, eta) -> None:
    monkeypatch.setattr(cut, "_NUMBERS", numbers)
    monkeypatch.setattr(cut, "_LEAST_ROWS", 4)
    options = {"gamma": gamma, "eta": eta, "is_causal": is_causal}
    results = []
    for fn in (clipped_softmax, clipped_softmax_reference):
        torch.manual_seed(1)
        leaves = [t.requires_grad_() for t in draw()]
        out = fn(*leaves, **options)
        results.append((out, *torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-10)


@pytest.mark.parametrize("implementation", ["blocked", "dense"])
def test_masks_and_biases(implementation) -> None:
    q, k, v = draw()
    for attn_mask in (torch.rand(63, 63) < 0.5, torch.randn(1, 4, 63, 63).double()):
        out = clipped_softmax(q, k, v, attn_mask=attn_mask, implementation=implementation)
        assert_close(out, clipped_softmax_reference(q, k, v, attn_mask=attn_mask), 1e-10)
    with pytest.raises(ValueError, match="does not broadcast"):
        clipped_softmax(q, k, v, attn_mask=torch.ones(62, 63, dtype=torch.bool))
    bias = torch.randn(63, 63).double().requires_grad_()
    clipped_softmax(q, k, v, attn_mask=bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="gradient"):
        clipped_softmax(q, k, v, attn_mask=bias, implementation="blocked")


def test_no_clip_is_softmax() -> None:
    q, k, v = draw()
    assert_close(clipped_softmax(q, k, v, gamma=0.0), softmax(q, k, v), 1e-10)
    closed = torch.full((2, 4, 63, 1), -800.0).double()
    assert torch.equal(gated(q, k, v, closed), torch.zeros(2, 4, 63, 12).double())
    assert_close(gated(q, k, v, -closed), softmax(q, k, v), 1e-10)
    assert (clipped_softmax_weights(q, k).sum(-1) < 1).any()


def test_gate_over_a_clipped_softmax() -> None:
    q, k, v = draw()
    gate = torch.randn(2, 4, 63, 1).double()
    out = gated(q, k, v, gate, gamma=-0.05, gate_scale=4.0)
    expected = clipped_softmax_reference(q, k, v, gamma=-0.05) * gate.sigmoid() * 4
    assert_close(out, expected, 1e-10)


SIZES = {  # H = 3 heads of d = 8
    "linear": 3 * (8 + 1),
    "mlp": 3 * (2 * (8 + 2) + 1),
    "mlp2": 3 * (8 * (8 + 2) + 1),
    "all_features": 3 * (24 + 1),
}


@pytest.mark.parametrize("kind", ["per_token", "per_head"])
@pytest.mark.parametrize("net", list(SIZES))
def test_gates_of_all_kinds(kind, net) -> None:
    gate = HeadGate(24, 3, kind=kind, net=net)
    assert sum(p.numel() for p in gate.parameters()) == SIZES[net]
    x = torch.randn(2, 7, 24)
    logits = gate(x)
    by_token = kind == "per_token" or net == "all_features"
    assert logits.shape == (2, 3, 7 if by_token else 1, 1)
    if by_token:
        x2 = x.clone()
        x2[:, 3] += 1
        changed = (gate(x2) != logits).any(1)[:, :, 0]
        assert torch.equal(changed, (torch.arange(7) == 3).expand(2, 7))


def test_averages_leave_out_padding_and_keep_sequences_apart() -> None:
    layer = GatedAttention(
        GatedConfig(embed_dim=24, num_heads=3, is_causal=False, gate="per_head", gate_net="mlp")
    ).double()
    x = torch.randn(2, 9, 24).double()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    y = layer(x, mask=mask)
    assert_close(y[1:, 4:], layer(x[1:, 4:]), 1e-10)
    packed = torch.cat((x[:1], x[1:, 4:]), 1)
    out = layer(packed, cu_seqlens=torch.tensor([0, 9, 14]))
    assert_close(out, torch.cat((y[:1], y[1:, 4:]), 1), 1e-10)


def test_gates_start_where_they_are_told() -> None:
    config = GatedConfig(embed_dim=24, num_heads=3, gate_init=0.25, fine_tuning=True)
    layer = GatedAttention(config)
    x = torch.randn(2, 9, 24)
    opened = layer.gate(x).sigmoid() * config.gate_scale
    assert (opened - 1).abs().max() < 0.2
    assert HeadGate(24, 3, kind="constant")(x).sigmoid().unique().tolist() == [0.5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate": "per_head"}, "later tokens"),
        ({"gate": "per_tokens"}, "per_token"),
        ({"gate_net": "mpl"}, "mlp"),
        ({"gate_init": 1.5}, "between 0 and 1"),
        ({"fine_tuning": True}, "gate_init"),
        ({"gamma": 0.1}, "at most 0"),
        ({"eta": 0.9}, "at least 1"),
    ],
)
def test_bad_options_are_named(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        GatedAttention(GatedConfig(embed_dim=24, num_heads=3, **options))


def test_gamma_is_a_constant_of_the_training_length() -> None:
    config = ClippedSoftmaxConfig(embed_dim=24, num_heads=3, alpha=12.0, max_length=512)
    assert config.clip_gamma == pytest.approx(-0.0234375)
    layer = ClippedSoftmaxAttention(config).double()
    x = torch.randn(1, 40, 24).double()
    assert_close(layer(x)[:, :20], layer(x[:, :20]), 1e-10)


@pytest.mark.parametrize("mixers", ["clipped_softmax*2", "gated,clipped_softmax"])
def test_mixers_train_and_stream(mixers) -> None:
    model = MixerLM(MixerLMConfig(embed_dim=24, num_heads=3, mixers=mixers, max_length=64))
    tokens = torch.randint(256, (2, 21))
    logits = model(tokens)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        first, state = model.update(tokens[:, :13], model.init_state(2))
        second, _ = model.update(tokens[:, 13:], state)
    assert_close(torch.cat((first, second), 1), logits, 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": "per_token", "gate_init": 0.25},
        {"alpha": 2.0, "max_length": 16},
        {"gate": "per_token", "gate_net": "all_features", "gamma": -0.02, "word_dim": 20},
        {"pre_norm": False, "gate": "constant"},
    ],
)
def test_opt_streams_with_padding(options) -> None:
    sizes = {"vocab_size": 53, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 48}
    model = QuantizableOPT(QuantizableOPTConfig(**sizes, max_positions=20, init_std=0.2, **options))
    model.eval().double()
    tokens = torch.randint(53, (2, 15))
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, :4] = False
    with torch.no_grad():
        logits = model(tokens, mask=mask)
        first, state = model.update(tokens[:, :9], model.init_state(2), mask=mask[:, :9])
        second, _ = model.update(tokens[:, 9:], state)
        assert_close(torch.cat((first, second), 1)[mask], logits[mask], 1e-9)
        assert_close(model(tokens[1:, 4:]), logits[1:, 4:], 1e-9)
    with pytest.raises(ValueError, match="positions"):
        model(torch.randint(53, (1, 21)))
