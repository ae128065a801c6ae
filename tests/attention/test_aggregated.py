"""Aggregated attention: against its definition, a dense softmax, TransNeXt's own claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention.aggregated import (
    AggregatedAttention,
    LengthScaledAttention,
    aggregated,
    aggregated_reference,
    aggregated_weights,
)
from manyheads.attention.aggregated.places import axis_table, pooled_place
from manyheads.attention.aggregated.position import position_bias, position_bias_reference
from manyheads.attention.grid import build_mixer, get_mixer
from manyheads.attention.grid.registry import GridShape
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import track_memory

SIZES = [((9, 7), 3, 6), ((5, 8), 5, 1), ((1, 6), 3, 2), ((2, 2), 7, 1)]


def _arguments(
    size: tuple[int, int], window: int, pooled: int, *, batch: int = 3, heads: int = 2, dim: int = 5
) -> tuple[list[Tensor], dict[str, Tensor]]:
    count = size[0] * size[1]
    inputs = [torch.randn(batch, heads, count, dim) for _ in range(3)]
    inputs += [torch.randn(batch, heads, pooled, dim) for _ in range(2)]
    options = {
        "scale": torch.rand(heads, 1, 1) + 3,
        "local_bias": torch.randn(heads, window**2),
        "pooled_bias": torch.randn(heads, count, pooled),
        "query_embedding": torch.randn(heads, 1, dim),
        "tokens": torch.randn(heads, dim, window**2),
        "token_bias": torch.randn(heads, 1, window**2),
    }
    return (
        [t.double().requires_grad_() for t in inputs],
        {k: t.double().requires_grad_() for k, t in options.items()},
    )


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(("size", "window", "pooled"), SIZES)
def test_shifts_are_the_definition_with_every_gradient(size, window, pooled, optional) -> None:
    inputs, options = _arguments(size, window, pooled)
    if not optional:
        options = {"scale": options["scale"]}
    results = []
    for implementation in ("shift", "reference"):
        out = aggregated(
            *inputs, size=size, window_size=window, implementation=implementation, **options
        )
        leaves = [*inputs, *options.values()]
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, leaves, torch.randn(out.shape).double())
        results.append([out.detach(), *grads])
    for fast, plain in zip(*results, strict=True):
        assert_close(fast, plain, 1e-10)


@pytest.mark.parametrize(("size", "window", "pooled"), SIZES)
def test_the_definition_is_a_masked_softmax_over_all_places(size, window, pooled) -> None:
    (q, k, v, far_k, far_v), o = _arguments(size, window, pooled)
    height, width = size
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    dy, dx = (places[None] - places[:, None]).unbind(-1)  # of key j from query i
    half = window // 2
    seen = (dy.abs() <= half) & (dx.abs() <= half)
    cell = ((dy + half) * window + dx + half).clamp(0, window**2 - 1)
    unit = F.normalize(q, dim=-1)
    scaled = (
        (unit + o["query_embedding"]) * o["scale"] * (seen.sum(1) + pooled).double().log()[:, None]
    )
    local = scaled @ F.normalize(k, dim=-1).mT + o["local_bias"][:, cell]
    pool = scaled @ F.normalize(far_k, dim=-1).mT + o["pooled_bias"]
    weights = torch.cat((local.masked_fill(~seen, float("-inf")), pool), -1).softmax(-1)
    extra = (unit @ o["tokens"] + o["token_bias"]).gather(3, cell.expand(*q.shape[:2], -1, -1))
    near = weights[..., : len(places)] + extra * seen
    expected = near @ v + weights[..., len(places) :] @ far_v
    assert_close(
        aggregated_reference(q, k, v, far_k, far_v, size=size, window_size=window, **o),
        expected,
        1e-12,
    )


def test_weights_sum_to_one_and_none_lies_outside() -> None:
    (q, k, _, far_k, _), o = _arguments((4, 6), 3, 5)
    near, far = aggregated_weights(q, k, far_k, size=(4, 6), scale=o["scale"])
    assert_close(near.sum(-1) + far.sum(-1), torch.ones(3, 2, 24).double(), 1e-12)
    assert not near[:, :, 0, :3].any()
    assert near[:, :, 0, [4, 5, 7, 8]].all()


def test_heads_in_turn_are_heads_together(monkeypatch) -> None:
    inputs, options = _arguments((9, 7), 3, 6)
    whole = aggregated(*inputs, size=(9, 7), **options)
    monkeypatch.setattr("manyheads.attention.aggregated.fast._MANY_SCORES", 1)
    with torch.no_grad():
        assert_close(aggregated(*inputs, size=(9, 7), **options), whole, 1e-12)
        options["scale"] = torch.tensor(4.0).double()
        in_turn = aggregated(*inputs, size=(9, 7), **options)
    assert_close(in_turn, aggregated_reference(*inputs, size=(9, 7), **options), 1e-12)


def test_zero_rows_and_huge_ones_stay_finite() -> None:
    inputs, options = _arguments((4, 5), 3, 2)
    with torch.no_grad():
        inputs[0][:, :, :3] = 0
        inputs[1][:, :, 2:9] = 0
        inputs[1][:, :, 9] = 1e120
        options["scale"].fill_(900)
    out = aggregated(*inputs, size=(4, 5), **options)
    grads = torch.autograd.grad(out.sum(), [*inputs, *options.values()])
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_scores_wide(dtype) -> None:
    inputs, options = _arguments((9, 7), 3, 6)
    inputs = [t.detach().to(dtype) for t in inputs]
    options = {k: t.detach().to(dtype) for k, t in options.items()}
    out = aggregated(*inputs, size=(9, 7), **options)
    assert out.dtype == dtype
    wide = aggregated(
        *(t.float() for t in inputs), size=(9, 7), **{k: t.float() for k, t in options.items()}
    )
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.parametrize("implementation", ["shift", "reference"])
def test_dropout_is_on_the_softmax_alone(implementation) -> None:
    inputs, options = _arguments((4, 5), 3, 2)
    options["implementation"] = implementation
    rest = aggregated(*inputs, size=(4, 5), dropout=1.0, **options)
    without = options | {"tokens": None, "token_bias": None}
    whole, softmax_part = (aggregated(*inputs, size=(4, 5), **o) for o in (options, without))
    assert_close(rest, whole - softmax_part, 1e-10)
    some = aggregated(*inputs, size=(4, 5), dropout=0.5, **options)
    assert not torch.allclose(some, whole)


def test_errors_name_the_axis() -> None:
    inputs, options = _arguments((4, 5), 3, 2)
    cases: list[tuple[str, list[Tensor], dict[str, Any]]] = [
        ("20 places, a map of 4 x 4", inputs, {"size": (4, 4)}),
        ("window_size 4", inputs, {"window_size": 4}),
        ("shfit", inputs, {"implementation": "shfit"}),
        ("key has shape", [inputs[0], inputs[1][:, :, 1:], *inputs[2:]], {}),
        ("pooled_key has shape", [*inputs[:3], inputs[3][..., 1:], inputs[4]], {}),
        ("pooled_key has 0", [*inputs[:3], inputs[3][:, :, :0], inputs[4][:, :, :0]], {}),
        ("pooled_value has shape", [*inputs[:4], inputs[4][:, :, 1:]], {}),
        ("local_bias has shape", inputs, {"local_bias": options["local_bias"][:, 1:]}),
        ("4 axes|expected 4", [inputs[0][0], *inputs[1:]], {}),
    ]
    for message, tensors, changes in cases:
        with pytest.raises(ValueError, match=message):
            aggregated(*tensors, **({"size": (4, 5)} | options | changes))
    for message, options in (
        ("dim 10 is not a multiple", {"num_heads": 3}),
        ("positions 'interpolate'", {"positions": "interpolate"}),
        ("needs grid", {"positions": "interpolation"}),
        ("pretrain_grid", {"pretrain_grid": (1, 4)}),
        ("window_size 2", {"window_size": 2}),
        ("sr_ratio 0", {"sr_ratio": 0}),
        ("fixed_pool_size 0", {"fixed_pool_size": 0}),
    ):
        with pytest.raises(ValueError, match=message):
            AggregatedAttention(10, **({"num_heads": 2} | options))
    with pytest.raises(ValueError, match="fixed_pool_size 4 must be below"):
        AggregatedAttention(8, num_heads=2, fixed_pool_size=4)(torch.randn(1, 8, 4, 9))


@pytest.mark.parametrize("size", range(1, 23))
def test_places_of_pooled_keys_are_means_of_bins(size) -> None:
    for pooled in range(1, size + 1):
        places = torch.arange(size, dtype=torch.float64)
        means = F.adaptive_avg_pool1d(places[None], pooled)[0]
        distances, index = axis_table(size, pooled)
        assert [pooled_place(i, size, pooled) / 2 for i in range(pooled)] == means.tolist()
        assert torch.equal(distances[index].double(), (places - means[:, None]).flatten())


@pytest.mark.parametrize("pretrain", [None, (3, 5)])
def test_the_position_mlp_in_pieces_is_the_mlp(pretrain, monkeypatch) -> None:
    monkeypatch.setattr("manyheads.attention.aggregated.position._PIECE", 200)
    first, second = torch.nn.Linear(2, 17).double(), torch.nn.Linear(17, 3).double()
    results = []
    for make in (position_bias, position_bias_reference):
        bias = make(first, second, (8, 7), (3, 2), pretrain)
        assert bias.shape == (3, 6, 56)
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            bias, [*first.parameters(), *second.parameters()], torch.randn(bias.shape).double()
        )
        results.append([bias.detach(), *grads])
    for fast, plain in zip(*results, strict=True):
        assert_close(fast, plain, 1e-10)


def test_no_window_is_ever_copied() -> None:
    """9 windows of keys and values are 18 maps; shifts hold scores and a few maps at once."""
    size, pooled, heads, dim = (28, 28), 9, 2, 24
    numel = heads * dim * size[0] * size[1]
    inputs, options = _arguments(size, 3, pooled, batch=1, heads=heads, dim=dim)
    inputs = [t.detach().float().requires_grad_() for t in inputs]
    inputs[:3] = [t.detach().mT.contiguous().requires_grad_().mT for t in inputs[:3]]
    options = {k: t.detach().float() for k, t in options.items()}
    peaks, retained, largest = {}, {}, {}
    for implementation in ("shift", "reference"):
        with track_memory() as tracker:
            out = aggregated(*inputs, size=size, implementation=implementation, **options)
            retained[implementation] = tracker.current / (4 * numel)
            out.sum().backward()
        peaks[implementation] = tracker.peak / (4 * numel)
        largest[implementation] = tracker.largest_numel / numel
        for t in inputs[3:]:
            t.grad = None
    assert largest["shift"] <= 1.2 < 9 <= largest["reference"]
    assert peaks["shift"] < 14 < 18 < peaks["reference"]
    assert retained["shift"] < 11 < 18 < retained["reference"]
    with torch.no_grad(), track_memory() as tracker:
        aggregated(*inputs, size=size, **options)
    assert tracker.peak / (4 * numel) < 9


def test_one_layer_sees_the_whole_map() -> None:
    x = torch.randn(1, 8, 9, 11, requires_grad=True)
    layer = AggregatedAttention(8, num_heads=2, sr_ratio=4)
    layer(x)[0, :, 0, 0].square().sum().backward()
    assert x.grad.abs().sum((0, 1)).all()


def test_the_log_of_the_length_keeps_attention_sharp() -> None:
    """Entropy of softmax(s · log N · cos) grows much slower with N than without the log."""
    entropies = []
    for count in (64, 4096):
        q, k = (F.normalize(torch.randn(n, 24), dim=-1) for n in (200, count))
        rows = [(s * q @ k.mT).softmax(-1) for s in (4.2, 4.2 * torch.tensor(float(count)).log())]
        entropies.append([-(p * p.clamp_min(1e-30).log()).sum(-1).mean() for p in rows])
    plain, scaled = (float(b - a) for a, b in zip(*entropies, strict=True))
    assert 0 < scaled < 0.5 * plain


@pytest.mark.parametrize("layer", [AggregatedAttention, LengthScaledAttention])
def test_both_modes_agree_at_home_and_differ_elsewhere(layer) -> None:
    torch.manual_seed(3)
    common = {"num_heads": 2, "grid": (8, 8), "pretrain_grid": (8, 8)}
    one = layer(8, positions="extrapolation", **common)
    two = layer(8, positions="interpolation", **common)
    two.load_state_dict(one.state_dict())
    home, away = torch.randn(2, 8, 8, 8), torch.randn(2, 8, 11, 17)
    assert torch.equal(one(home), two(home))
    assert not torch.allclose(one(away), two(away), atol=1e-6)


def test_pixel_focused_is_without_what_is_learned_beside() -> None:
    layer = AggregatedAttention(8, num_heads=2, pixel_focused=True)
    names = {n for n, _ in layer.named_parameters()}
    assert not {"query_embedding", "learnable_tokens", "learnable_bias"} & names
    full = AggregatedAttention(8, num_heads=2)
    full.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for n in ("query_embedding", "learnable_tokens", "learnable_bias"):
            getattr(full, n).zero_()
    x = torch.randn(2, 8, 9, 7)
    assert_close(layer(x), full(x), 1e-6)


def test_autocast_and_channels_last_change_little_and_nothing() -> None:
    layer = AggregatedAttention(8, num_heads=2, sr_ratio=2)
    x = torch.randn(2, 8, 9, 7)
    assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x).float(), layer(x.double().float()).float(), 1e-6)
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert_close(low.float(), layer(x), 0.05)


@pytest.mark.parametrize("name", ["aggregated", "length_scaled"])
def test_mixers_count_their_flops(name) -> None:
    shape = GridShape(batch=2, dim=48, height=28, width=28, num_heads=2)
    mixer = build_mixer(name, 48, num_heads=2, grid=(28, 28), implementation="reference")
    x = torch.randn(2, 48, 28, 28)
    total = count_flops(mixer.eval(), x).total
    bias = count_flops(mixer.position_bias, 28, 28).total
    assert total - bias == get_mixer(name).flops(shape)
    with pytest.raises(ValueError, match="no option 'window'"):
        build_mixer(name, 48, num_heads=2, window=3)
