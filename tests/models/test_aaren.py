"""Aaren models: sizes, streaming through all layers, conversion, and the task models."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compare import assert_close
from manyheads.layers.state import clone_state, reorder_state, state_bytes
from manyheads.models import create_model, get_variant
from manyheads.models.base import load_model
from manyheads.models.language.aaren import (
    AarenClassifier,
    AarenClassifierConfig,
    AarenEventModel,
    AarenEventsConfig,
    AarenForecaster,
    AarenForecasterConfig,
    AarenLayer,
    AarenLayerConfig,
    AarenPolicy,
    AarenPolicyConfig,
    AarenStack,
    AarenStackConfig,
)

SMALL = {"embed_dim": 60, "num_heads": 3, "ff_dim": 44}
LENGTH = 63


def masks() -> Tensor:
    """Padded left, padded right, padded on both sides with a hole."""
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, :11] = mask[1, -9:] = mask[2, :4] = mask[2, -3:] = mask[2, 20:30] = False
    return mask


def stack(**options) -> AarenStack:
    return AarenStack(AarenStackConfig(**SMALL, num_layers=3, **options)).double().eval()


def test_parameters_are_those_of_the_paper() -> None:
    """One query more than a Transformer layer of the same sizes."""
    layer = create_model("aaren_layer_512", device="meta")
    assert layer.num_parameters() == 3_152_896
    transformer = nn.TransformerEncoderLayer(512, 8, 2048, device="meta")
    assert sum(p.numel() for p in transformer.parameters()) == 3_152_384
    names = {k: t.shape for k, t in transformer.state_dict().items()}
    assert {k: t.shape for k, t in layer.to_official().items()} == names | {"query": (512,)}
    assert get_variant("aaren_layer_512").slug == "aaren"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
def test_layer_is_a_transformer_layer_on_every_prefix(norm_first, activation) -> None:
    """Norms, residuals and MLP are torch's: with one token, attention is the same in both."""
    act = nn.GELU(approximate="tanh") if activation == "gelu_tanh" else activation
    torch_layer = nn.TransformerEncoderLayer(
        60, 3, 44, dropout=0.3, activation=act, norm_first=norm_first, batch_first=True
    )
    torch_layer.double().eval()
    query = torch.randn(60)
    layer = AarenLayer.from_encoder_layer(torch_layer, query=query)
    assert layer.config.activation == activation
    assert layer.config.dropout == 0.3
    assert not layer.training
    assert torch.equal(layer.attention.query.detach(), query.double())
    x = torch.randn(5, 1, 60).double()
    assert_close(layer(x), torch_layer(x), 1e-12)


def test_conversion_keeps_missing_biases_and_refuses_other_activations() -> None:
    plain = nn.TransformerEncoderLayer(60, 3, 44, bias=False)
    assert not any("bias" in name for name in AarenLayer.from_encoder_layer(plain).state_dict())
    odd = nn.TransformerEncoderLayer(60, 3, 44, activation=torch.tanh)
    with pytest.raises(ValueError, match="neither ReLU nor GELU"):
        AarenLayer.from_encoder_layer(odd)


@pytest.mark.parametrize("final", [False, True])
def test_a_whole_encoder_is_converted(final) -> None:
    layer = nn.TransformerEncoderLayer(60, 3, 44, norm_first=True, batch_first=True)
    norm = nn.LayerNorm(60) if final else None
    encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    queries = list(torch.randn(2, 60))
    ours = AarenStack.from_encoder(encoder, queries=queries)
    x = torch.randn(4, 1, 60)
    assert_close(ours(x), encoder(x), 1e-5)
    official = ours.to_official()
    assert set(encoder.layers[1].state_dict()) | {"query"} == {
        k[2:] for k in official if k.startswith("1.")
    }
    assert torch.equal(official["1.query"], queries[1])
    again = AarenStack(ours.config).load_official(official).eval()
    assert torch.equal(again(x), ours(x))


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "final_norm": True}, {"bias": False}])
def test_stack_streams_in_any_split(options) -> None:
    model, x, mask = stack(**options), torch.randn(3, LENGTH, 60).double(), masks()
    mask[:, 50:] = True
    with torch.no_grad():
        whole = model(x, mask=mask)
        first, state = model.update(x[:, :20], model.init_state(3), mask=mask[:, :20])
        second, state = model.update(x[:, 20:50], state, mask=mask[:, 20:50])
        branch, rest = clone_state(state), []
        for t in range(50, LENGTH):
            out, state = model.step(x[:, t], state)
            rest.append(out)
        streamed = torch.cat((first, second, torch.stack(rest, 1)), 1)
        assert_close(streamed[mask], whole[mask], 1e-10)
        order = torch.tensor([2, 0, 0])
        out, _ = model.step(x[order, 50], reorder_state(branch, order))
        assert_close(out, whole[order, 50], 1e-10)


def test_stack_is_causal_and_blind_to_padding_and_packing() -> None:
    model, x, mask = stack(), torch.randn(3, LENGTH, 60).double(), masks()
    y = model(x, mask=mask)
    rows = [model(x[i : i + 1, mask[i]]) for i in range(3)]
    for i, row in enumerate(rows):
        assert_close(y[i : i + 1, mask[i]], row, 1e-10)
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    packed = torch.cat([x[i, mask[i]] for i in range(3)])[None]
    assert_close(model(packed, cu_seqlens=borders), torch.cat(rows, 1), 1e-10)
    changed = x.clone()
    changed[:, 31:] = torch.randn_like(changed[:, 31:])
    assert_close(model(changed)[:, :31], model(x)[:, :31], 1e-12)


def test_streaming_memory_is_constant() -> None:
    model = stack().float()
    sizes = []
    with torch.no_grad():
        for length in (10, 10_000):
            _, state = model.update(torch.randn(1, length, 60), model.init_state(1))
            _, state = model.step(torch.randn(1, 60), state)
            sizes.append(state_bytes(state))
    assert sizes == [4 * 3 * 3 * (20 + 2)] * 2


def test_dropout_acts_on_outputs_in_training_only() -> None:
    model = AarenLayer(AarenLayerConfig(**SMALL, dropout=0.5))
    x = torch.randn(1, 9, 60)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_compiles_whole_and_every_parameter_trains() -> None:
    model = stack().float().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 33, 60)
    for layer in model.layers:
        layer.dropout.p = 0.0
    out = compiled(x)
    assert_close(out, model(x), 1e-5)
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_saving_gives_the_model_back(tmp_path) -> None:
    model = AarenClassifier(AarenClassifierConfig(**SMALL, in_channels=5, num_classes=4)).eval()
    model.save(tmp_path)
    x = torch.randn(2, 30, 5)
    assert torch.equal(load_model(tmp_path).eval()(x), model(x))


# The task models.


def test_classifier_reads_the_last_real_token() -> None:
    config = AarenClassifierConfig(**SMALL, num_layers=2, in_channels=5, num_classes=4)
    model = AarenClassifier(config).double().eval()
    x, mask = torch.randn(3, LENGTH, 5).double(), masks()
    logits = model(x, mask=mask)
    alone = torch.cat([model(x[i : i + 1, mask[i]]) for i in range(3)])
    assert_close(logits, alone, 1e-10)
    borders = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    packed = torch.cat([x[i, mask[i]] for i in range(3)])[None]
    assert_close(model(packed, cu_seqlens=borders), alone, 1e-10)
    state, streamed = model.init_state(3), []
    so_far, state = model.update(x[:, :40], state, mask=mask[:, :40])
    for t in range(40, LENGTH):
        out, state = model.step(x[:, t], state)
        streamed.append(out)
    assert_close(torch.stack(streamed, 1)[0, -1], logits[0], 1e-10)
    assert_close(so_far[2, 39], model(x[2:, :40], mask=mask[2:, :40])[0], 1e-10)
    with pytest.raises(ValueError, match="real token"):
        model(x, mask=torch.zeros_like(mask))
    with pytest.raises(ValueError, match="empty"):
        model(packed, cu_seqlens=torch.tensor([0, 5, 5, packed.shape[1]]))


def test_order_matters_only_with_positions() -> None:
    x = torch.randn(2, 20, 5).double()
    swapped = torch.cat((x[:, :19].flip(1), x[:, 19:]), 1)
    for add_positions in (True, False):
        config = AarenClassifierConfig(
            **SMALL, num_layers=1, in_channels=5, num_classes=4, add_positions=add_positions
        )
        model = AarenClassifier(config).double().eval()
        same = torch.allclose(model(x), model(swapped), rtol=1e-9)
        assert same is not add_positions


@pytest.mark.parametrize("normalize", ["window", "running", "none"])
def test_forecasts_move_with_the_series(normalize) -> None:
    """Scaled and shifted by any amount, a normalised series has the same forecast, moved alike."""
    config = AarenForecasterConfig(**SMALL, in_channels=3, horizon=7, normalize=normalize)
    model = AarenForecaster(config).double().eval()
    x, mask = torch.randn(3, LENGTH, 3).double(), masks()
    out = model(x, mask=mask)
    assert out.shape == (3, 7, 3)
    alone = torch.cat([model(x[i : i + 1, mask[i]]) for i in range(3)])
    assert_close(out, alone, 1e-9)
    scale, shift = torch.tensor([100.0, 3.0, 20.0]), torch.tensor([5e4, -2.0, 0.0])
    moved = model(x * scale + shift, mask=mask)
    if normalize == "none":
        assert not torch.allclose(moved, out * scale + shift, rtol=1e-3)
    else:
        torch.testing.assert_close((moved - shift) / scale, out, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalize", ["running", "none"])
def test_forecasts_stream(normalize) -> None:
    config = AarenForecasterConfig(**SMALL, in_channels=3, horizon=7, normalize=normalize)
    model = AarenForecaster(config).double().eval()
    x, mask = torch.randn(3, LENGTH, 3).double() + 1000, masks()
    mask[:, 50:] = True
    whole = model.every_prefix(x, mask=mask)
    assert_close(whole[:, -1], model(x, mask=mask), 1e-10)
    first, state = model.update(x[:, :9], model.init_state(3), mask=mask[:, :9])
    second, state = model.update(x[:, 9:50], state, mask=mask[:, 9:50])
    rest = []
    for t in range(50, LENGTH):
        out, state = model.step(x[:, t], state)
        rest.append(out)
    streamed = torch.cat((first, second, torch.stack(rest, 1)), 1)
    assert_close(streamed[mask], whole[mask], 1e-9)
    changed = torch.cat((x[:, :31], torch.randn(3, LENGTH - 31, 3).double()), 1)
    assert_close(
        model.every_prefix(changed, mask=mask)[:, 12:31], whole[:, 12:31], 1e-10, "no look-ahead"
    )


def test_a_window_does_not_stream() -> None:
    config = AarenForecasterConfig(**SMALL, in_channels=3, horizon=7, normalize="window")
    with pytest.raises(ValueError, match="normalize='running'"):
        AarenForecaster(config).init_state(1)
    with pytest.raises(ValueError, match="normalize='running'"):
        AarenForecaster(config).every_prefix(torch.randn(1, 5, 3))
    with pytest.raises(ValueError, match="did you mean 'running'"):
        AarenForecasterConfig(in_channels=3, horizon=7, normalize="runing")


def events() -> tuple[AarenEventModel, Tensor, Tensor, Tensor]:
    model = AarenEventModel(AarenEventsConfig(**SMALL, num_marks=5, num_components=4))
    times, marks = torch.rand(3, LENGTH).double().cumsum(1), torch.randint(5, (3, LENGTH))
    return model.double().eval(), times, marks, masks()


def test_events_are_blind_to_padding_and_stream() -> None:
    model, times, marks, mask = events()
    mask[:, 50:] = True
    noise = times.masked_fill(~mask, 1e9)
    whole = model(noise, marks, mask=mask)
    when, which = model.log_likelihood(noise, marks, mask=mask)
    for i in range(3):
        alone = model(times[i : i + 1, mask[i]], marks[i : i + 1, mask[i]])
        for a, b in zip(whole, alone, strict=True):
            assert_close(a[i, mask[i]], b[0], 1e-10)
        own = model.log_likelihood(times[i : i + 1, mask[i]], marks[i : i + 1, mask[i]])
        assert_close(when[i, mask[i]], own[0][0], 1e-9)
        assert_close(which[i, mask[i]], own[1][0], 1e-9)
    assert (when[~mask] == 0).all()
    first, state = model.update(
        noise[:, :50], marks[:, :50], model.init_state(3), mask=mask[:, :50]
    )
    parts = [first.mark_logits]
    for t in range(50, LENGTH):
        out, state = model.step(times[:, t], marks[:, t], state)
        parts.append(out.mark_logits[:, None])
    assert_close(torch.cat(parts, 1)[mask], whole.mark_logits[mask], 1e-10)
    assert torch.equal(state.time, times[:, -1])


def test_event_densities_are_densities() -> None:
    model, times, marks, _ = events()
    expected = model(times, marks)
    grid = torch.linspace(-12, 12, 20_001).double().exp()
    at = type(expected)(*(t[0, 9] for t in expected))
    at = at._replace(log_scales=at.log_scales - 1)  # a tail that the grid holds
    density = at.interval_log_prob(grid).exp()
    assert math.isclose(torch.trapezoid(density, grid).item(), 1, abs_tol=1e-3)
    mean = torch.trapezoid(density * grid, grid).item()
    assert math.isclose(mean, at.interval.item(), rel_tol=2e-2)
    marks_ = torch.arange(5)
    total = type(at)(*(t.expand(5, -1) for t in at)).mark_log_prob(marks_).exp().sum()
    assert math.isclose(total.item(), 1, rel_tol=1e-9)
    when, which = model.log_likelihood(times, marks)
    assert_close(when[:, 1:], type(expected)(*(t[:, :-1] for t in expected)).interval_log_prob(
        times.diff(dim=1)), 1e-12)  # fmt: skip
    loss = model.loss(times, marks)
    assert math.isclose(loss.item(), -(when + which).sum().item() / (3 * (LENGTH - 1)))
    same = model.loss(torch.ones(1, 4).double(), marks[:1, :4])
    assert torch.isfinite(same), "events at one time"


@pytest.mark.parametrize("discrete", [False, True])
def test_policy_acts_as_it_was_trained(discrete) -> None:
    config = AarenPolicyConfig(
        **SMALL, observation_dim=6, action_dim=4, discrete=discrete, max_timestep=64
    )
    policy = AarenPolicy(config).double().eval()
    returns, observations = torch.randn(3, 30).double(), torch.randn(3, 30, 6).double()
    actions = torch.randint(4, (3, 30)) if discrete else torch.randn(3, 30, 4).double()
    times = torch.arange(30).expand(3, -1)
    whole = policy(returns, observations, actions, times)
    state, acted = policy.init_state(3), []
    for t in range(30):
        out, state = policy.act(returns[:, t], observations[:, t], times[:, t], state)
        acted.append(out)
        state = policy.record(actions[:, t], times[:, t], state)
    assert_close(torch.stack(acted, 1), whole, 1e-10)
    if not discrete:
        assert whole.abs().max() <= 1
    blind = actions.clone()
    blind[:, 9:] = 0
    assert_close(policy(returns, observations, blind, times)[:, :10], whole[:, :10], 1e-12)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, :8] = False
    padded = policy(returns, observations, actions, times, mask=mask)
    alone = policy(returns[:1, 8:], observations[:1, 8:], actions[:1, 8:], times[:1, 8:])
    assert_close(padded[:1, 8:], alone, 1e-10)


def test_bad_sizes_name_themselves() -> None:
    with pytest.raises(ValueError, match="not a multiple of num_heads 7"):
        AarenStackConfig(embed_dim=60, num_heads=7)
    with pytest.raises(ValueError, match="activation 'rely'"):
        AarenLayerConfig(activation="rely")
    with pytest.raises(ValueError, match="horizon 0"):
        AarenForecasterConfig(in_channels=3, horizon=0)
