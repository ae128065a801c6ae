"""Orchid beyond the contract: circles, equivariance, transforms, static filters, precision."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_close, relative_error
from manyheads.attention import (
    OrchidAttention,
    OrchidConfig,
    circular_conv,
    circular_conv_reference,
    conditioning_type1,
    conditioning_type2,
    orchid,
    orchid_reference,
)
from manyheads.choose.memory import largest_tensor_numel, peak_memory

OFFICIAL_KERNEL = {
    "type": "absfreq", "nn": "convtf", "conv_filter_size": 3, "padding_mode": "zeros",
    "norm": "layernorm", "n_layer": 1, "activation": "gelu", "actq": "id", "wd": None, "lr": None,
    "bias": True,
}  # fmt: skip
OFFICIAL = {
    "d_model": 6, "l_max": 13, "dxt": "fft-o", "conv_kernel": OFFICIAL_KERNEL, "filter_order": 10,
    "residual_long_conv": "sconv", "order": 2, "short_filter_order": 3, "emb_dim": 5,
    "num_inner_mlps": 1, "w": 10, "wd": 0, "lr": 0.001, "lr_pos_emb": 1e-05, "causal": False,
}  # fmt: skip


def layer(**options) -> OrchidAttention:
    return OrchidAttention(OrchidConfig(**({"embed_dim": 12} | options))).double().eval()


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 70),
    norm=st.sampled_from(["backward", "ortho", "forward"]),
    shared=st.booleans(),
)
def test_fft_is_the_direct_circular_sum(length, norm, shared) -> None:
    torch.manual_seed(length)
    x = torch.randn(2, 3, length, 4).double()
    kernel = torch.randn(*(() if shared else (2, 3)), length, 1 if shared else 4).double()
    leaves = [x.requires_grad_(), kernel.requires_grad_()]
    results = [f(*leaves, norm=norm) for f in (circular_conv, circular_conv_reference)]
    assert_close(results[0], results[1], 1e-12)
    cotangent = torch.randn_like(x)
    for a, b in zip(
        *(torch.autograd.grad((r * cotangent).sum(), leaves) for r in results), strict=True
    ):
        assert_close(a, b, 1e-11)
    spectrum = torch.fft.rfft(kernel, dim=-2, norm=norm)
    assert_close(circular_conv(x, spectrum, norm=norm, domain="frequency"), results[1], 1e-12)


def test_it_is_the_circulant_matrix() -> None:
    x, kernel = torch.randn(11, 2).double(), torch.randn(11, 2).double()
    place = torch.arange(11)
    circulant = kernel[(place[:, None] - place) % 11]  # (N, N, D)
    assert_close(circular_conv(x, kernel), torch.einsum("ijd,jd->id", circulant, x), 1e-12)


@settings(max_examples=20, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    masked=st.booleans(),
    shared=st.booleans(),
    implementation=st.sampled_from(["fft", "direct"]),
    norm=st.sampled_from(["backward", "ortho"]),
)
def test_grouped_heads_skips_and_shared_kernels(
    groups, masked, shared, implementation, norm
) -> None:
    torch.manual_seed(0)
    q = torch.randn(3, 4, 21, 5).double()
    k, v = torch.randn(2, 3, 4 // groups, 21, 5).double()
    kernel = torch.randn(1 if shared else 3, 4 // groups, 21, 5).double()
    mask = torch.rand(3, 21) < 0.7 if masked else None
    options = {"mask": mask, "skip": torch.randn(4, 5).double(), "norm": norm}
    out = orchid(q, k, v, kernel, implementation=implementation, **options)
    assert_close(out, orchid_reference(q, k, v, kernel, **options), 1e-11)


def test_packed_sequences_have_circles_of_their_own() -> None:
    q, k, v, h = torch.randn(4, 1, 2, 30, 5).double()
    borders = [0, 7, 7, 20, 30]
    packed = orchid(q, k, v, h, cu_seqlens=torch.tensor(borders))
    for a, b in pairwise(borders):
        if a < b:
            alone = orchid(*(t[:, :, a:b] for t in (q, k, v, h)))
            assert_close(packed[:, :, a:b], alone, 1e-11)


@pytest.mark.parametrize("length", [16, 15, 1, 2])
@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("complex_rows", [False, True])
def test_core_commutes_with_shifts(kind, length, complex_rows) -> None:
    """To 1e-5 in float32, and exactly the padding of the convolution in time decides it."""
    x = torch.randn(2, length, 4)
    time = torch.randn(2, 4, 3)
    biases = torch.randn(2, 4)
    rows = 8 if complex_rows else 4
    weight = torch.randn(rows, 2, 3) if kind == 2 and complex_rows else torch.randn(rows, 3)
    bias = torch.randn(rows)

    def core(x, padding="circular"):
        if kind == 1:
            h = conditioning_type1(
                x, time[0], weight, time_bias=biases[0], frequency_bias=bias, padding=padding
            )
        else:
            h = conditioning_type2(
                x, *time, weight, key_bias=biases[0], query_bias=biases[1], frequency_bias=bias,
                padding=padding,
            )  # fmt: skip
        return circular_conv(x, h, domain="frequency")

    shifted = core(x.roll(3, 1))
    assert relative_error(shifted, core(x).roll(3, 1)) < 1e-5
    if length > 2:
        assert relative_error(core(x.roll(3, 1), "zeros"), core(x, "zeros").roll(3, 1)) > 1e-3


@pytest.mark.parametrize("conditioning", ["type1", "type2", "phase"])
@pytest.mark.parametrize("parity", [False, True])
def test_kernels_of_the_layer_ignore_shifts(conditioning, parity) -> None:
    net = layer(conditioning=conditioning, parity=parity)
    x = torch.randn(2, 17, 12).double()
    error = relative_error(net.adaptive_kernel(x.roll(5, 1)).abs(), net.adaptive_kernel(x).abs())
    assert (error < 1e-9) == (conditioning != "phase")
    zeros = layer(conditioning=conditioning, padding="zeros")
    assert relative_error(
        zeros.adaptive_kernel(x.roll(5, 1)).abs(), zeros.adaptive_kernel(x).abs()
    ) > 1e-3  # fmt: skip


def test_the_layer_is_the_papers_formula() -> None:
    net = layer(norm="backward", kernel_norm="none", residual_conv=False, embed_dim=3)
    x = torch.randn(2, 9, 3).double()
    u = net.in_proj(x)
    conv, time, freq = net.short_conv, *(
        stack.convs[0] for stack in (net.conditioning.time, net.conditioning.frequency)
    )  # fmt: skip
    h = conditioning_type1(
        u[..., 6:], time.weight[:, 0], freq.weight[:, 0],
        time_bias=time.bias, frequency_bias=freq.bias,
    )  # fmt: skip
    short = torch.nn.functional.conv1d(u.mT, conv.weight, conv.bias, padding=2, groups=9)
    x0, x1, v = short[..., :9].mT.chunk(3, -1)
    taps = net.static_kernel(9) + torch.fft.irfft(h, n=9, dim=1)
    y = circular_conv_reference(x1 * v, taps) + net.static.bias * (x1 * v)
    assert_close(net(x), net.out_proj(x0 * y), 1e-11)


OPTIONS = [
    {"conditioning": "type2", "sigma": "tanh", "sigma_on_magnitude": True},
    {"conditioning": "type2", "sigma": "softshrink", "domains": "time"},
    {"conditioning": "type2", "transform": "dct", "parity": True},
    {"conditioning": "type2", "sigma": "sigmoid", "parity": True},
    {"domains": "frequency", "kernel_norm": "batch"},
    {"domains": "time", "two_sided": True},
    {"conditioning": "phase", "two_sided": True, "parity": True},
    {"transform": "dct", "norm": "backward", "padding": "reflect", "two_sided": True},
    {"transform": "dct1", "norm": "backward"},
    {"kernel_layers": 3, "kernel_size": 5, "padding": "zeros"},
    {"kernel_layers": 2, "conditioning": "type2", "kernel_bias": False},
    {"norm": "forward", "short_conv": 1, "residual_conv": False},
    {"filter_layers": 0, "filter_features": 3, "filter_decay": False, "learn_positions": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_the_layer(options) -> None:
    """Batches, padding and packing as single sequences; every weight learns; names both ways."""
    net = layer(**options)
    if options.get("kernel_norm") == "batch":
        net.train()(torch.randn(3, 20, 12).double())
        net.eval()
    x, mask = torch.randn(2, 20, 12).double(), torch.ones(2, 20, dtype=torch.bool)
    mask[0, :6] = False
    mask[1, 9:11] = False
    y = net(x, mask=mask)
    rows = [net(x[i : i + 1, mask[i]]) for i in range(2)]
    for i, row in enumerate(rows):
        assert_close(y[i : i + 1, mask[i]], row, 1e-11)
    packed = torch.cat([x[i, mask[i]] for i in range(2)])[None]
    assert_close(net(packed, cu_seqlens=torch.tensor([0, 14, 32])), torch.cat(rows, 1), 1e-11)
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
    other = layer(**options).load_official(net.to_official())
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("length", [2, 3, 12, 13])
@pytest.mark.parametrize("norm", ["ortho", "backward", "forward"])
def test_cosine_transform_is_its_matrix(length, norm) -> None:
    from manyheads.layers.fourier import dct, idct

    place = torch.arange(length).double()
    matrix = 2 * torch.cos(torch.pi * place[:, None] * (2 * place + 1) / (2 * length))
    if norm == "ortho":
        matrix = matrix * (2 * length) ** -0.5
        matrix[0] *= 0.5**0.5
        assert_close(matrix @ matrix.mT, torch.eye(length).double(), 1e-12)
    elif norm == "forward":
        matrix = matrix / (2 * length)
    x = torch.randn(3, length).double().requires_grad_()
    assert_close(dct(x, norm=norm), x @ matrix.mT, 1e-12)
    assert_close(idct(dct(x, norm=norm), norm=norm), x, 1e-12)
    assert torch.autograd.gradcheck(lambda t: dct(t, norm=norm), x)
    assert torch.autograd.gradcheck(lambda t: idct(t, norm=norm), x)


@pytest.mark.parametrize("length", [1, 2, 7, 8])
@pytest.mark.parametrize("norm", ["ortho", "backward", "forward"])
def test_gradient_of_the_real_transform(length, norm) -> None:
    from manyheads.layers.fourier import rfft

    x = torch.randn(3, length).double().requires_grad_()
    for n in (None, length, 2 * length):
        assert_close(
            torch.view_as_real(rfft(x, n=n, norm=norm)),
            torch.view_as_real(torch.fft.rfft(x, n=n, norm=norm)),
            1e-12,
        )
        assert torch.autograd.gradcheck(lambda t, n=n: rfft(t, n=n, norm=norm), x)


def test_the_two_sided_batch_does_not_mix() -> None:
    """The official module returns (B, B, N, C) there; each row has to be what it is alone."""
    net = OrchidAttention(OrchidConfig.from_official(OFFICIAL | {"causal": True})).eval()
    assert net.config.two_sided
    x = torch.randn(3, 13, 6)
    y = net(x)
    assert y.shape == x.shape
    assert net.adaptive_kernel(x).shape == (3, 6, 13)
    assert_close(y, torch.cat([net(x[i : i + 1]) for i in range(3)]), 1e-6)


def test_official_configs() -> None:
    config = OrchidConfig.from_official(OFFICIAL)
    assert (config.transform, config.norm, config.two_sided) == ("fft", "ortho", False)
    assert (config.parity, config.padding, config.filter_features) == (True, "zeros", 5)
    default = OrchidConfig.from_official({"d_model": 8})
    assert (default.two_sided, default.norm, default.max_length) == (True, "forward", 128)
    shrink = OFFICIAL_KERNEL | {"type": "corrTime", "actq": "softshrink+0.1_abs"}
    config = OrchidConfig.from_official(OFFICIAL | {"conv_kernel": shrink, "dxt": "dctxd-o"})
    assert (config.sigma, config.sigma_threshold) == ("softshrink", 0.1)
    assert (config.sigma_on_magnitude, config.transform) == (True, "dct")
    for change, message in (
        ({"order": 3}, "order=3"),
        ({"emb_dim": 4}, "filter_features 4"),
        ({"emb_dims": 3}, "emb_dim"),
        ({"dxt": "fftt"}, "dxt"),
        ({"causal": True, "conv_kernel": OFFICIAL_KERNEL | {"type": "corrTime"}}, "two_sided"),
        ({"conv_kernel": OFFICIAL_KERNEL | {"typ": "freq"}}, "type"),
    ):
        with pytest.raises(ValueError, match=message):
            OrchidConfig.from_official(OFFICIAL | change)


def test_static_filters_are_computed_once_in_eval(monkeypatch) -> None:
    net = layer()
    calls = []
    inner = type(net.static).forward
    monkeypatch.setattr(
        type(net.static), "forward", lambda self, n: calls.append(n) or inner(self, n)
    )
    x = torch.randn(1, 20, 12).double()
    fresh = net(x)
    calls.clear()
    with torch.no_grad():
        for _ in range(3):
            assert_close(net(x), fresh, 1e-12)
        assert calls == [20, 20], "once for each of two filters"
        net(x[:, :7])
        assert calls == [20, 20, 7, 7]
        net.static.out.weight.mul_(2)
        assert relative_error(net(x), fresh) > 1e-3, "changed weights are noticed"
        changed = net(x)
    with torch.inference_mode():
        assert_close(net(x), changed, 1e-12)
    assert_close(net(x), changed, 1e-12)
    assert net(x).requires_grad
    net.train()
    assert not net._cache


def test_a_kernel_from_another_sequence() -> None:
    net = layer()
    x, context = torch.randn(2, 2, 15, 12).double()
    assert_close(net(x, context=x), net(x), 1e-12)
    other = net(x, context=context)
    assert relative_error(other, net(x)) > 1e-3
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[0, 10:] = False
    alone = net(x[:1, :10], context=context[:1, :10])
    assert_close(net(x, context=context, mask=mask)[:1, :10], alone, 1e-12)
    with pytest.raises(ValueError, match="context"):
        net(x, context=context[:, :10])


def test_short_sequences_keep_the_places_of_the_long_filter() -> None:
    net = layer(max_length=50)
    assert torch.equal(net.static_kernel(20), net.static_kernel(50)[:, :20])
    with pytest.raises(ValueError, match="max_length=51"):
        net(torch.randn(1, 51, 12).double())


def test_float16_runs_its_transforms_in_float32() -> None:
    """A length that is no power of two, and sums beyond 65,504."""
    x = (torch.rand(1, 2, 3000, 8) * 8).half()
    kernel = (torch.rand(1, 2, 3000, 8) * 8).half()
    y = circular_conv(x, kernel, norm="forward")
    assert y.dtype == torch.float16
    assert_close(y, circular_conv(x.double(), kernel.double(), norm="forward"), 1e-3)


def test_nothing_quadratic_and_linear_memory() -> None:
    peaks = []
    for length in (1024, 2048):
        leaves = [torch.randn(1, 4, length, 16, requires_grad=True) for _ in range(4)]

        def run(leaves=leaves):
            orchid(*leaves).square().sum().backward()

        assert largest_tensor_numel(run) < 2 * leaves[0].numel()
        peaks.append(peak_memory(run).peak_bytes)
    assert peaks[1] < 2.2 * peaks[0]


def test_function_compiles() -> None:
    leaves = [torch.randn(1, 2, 33, 5, requires_grad=True) for _ in range(4)]
    compiled = torch.compile(orchid, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*leaves), orchid(*leaves), 1e-6)
    grads = [torch.autograd.grad(f(*leaves).square().sum(), leaves) for f in (compiled, orchid)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, 1e-5)


def test_errors_name_the_fix() -> None:
    q, k, v, h = torch.randn(4, 1, 2, 9, 5)
    with pytest.raises(ValueError, match="no causal form"):
        orchid(q, k, v, h, is_causal=True)
    with pytest.raises(ValueError, match="no causal form"):
        OrchidConfig(embed_dim=8, is_causal=True)
    with pytest.raises(ValueError, match="kernel has shape"):
        orchid(q, k, v, h[:, :, :8])
    with pytest.raises(ValueError, match="head_dim of key and value"):
        orchid(q, k, v[..., :3], h)
    with pytest.raises(ValueError, match="needs 5"):
        circular_conv(q, h, domain="frequency")
    with pytest.raises(ValueError, match="ortho"):
        circular_conv(q, h, norm="orto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="direct"):
        orchid(q, k, v, h, implementation="directly")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        orchid(q, k, v, h, mask=torch.ones(1, 9).bool(), cu_seqlens=torch.tensor([0, 9]))
    with pytest.raises(ValueError, match="must be odd"):
        OrchidConfig(embed_dim=8, kernel_size=4)
    with pytest.raises(ValueError, match="type2"):
        OrchidConfig(embed_dim=8, conditioning="type2", two_sided=True)
    with pytest.raises(ValueError, match="too short to reflect"):
        layer(padding="reflect")(torch.randn(1, 1, 12).double())
    with pytest.raises(ValueError, match="no streaming form"):
        layer().init_state(1)
