"""What is particular to mamba; the contract suite does the rest."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compare import assert_close
from manyheads.attention import (
    MambaConfig,
    MambaMixer,
    MambaState,
    mamba,
    mamba_reference,
    mamba_step,
    mamba_update,
    selective_scan,
)
from manyheads.choose.memory import peak_memory
from manyheads.layers.conv import ShortConv

token = importlib.import_module("manyheads.attention.mamba.token")
OPTIONS = ("skip", "gate", "delta_bias")


def draw(
    *, batch: int = 2, heads: int = 2, kv: int = 2, length: int = 63, d: int = 5, v: int = 7
) -> dict[str, Tensor]:
    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    return {
        "query": normal(batch, heads, length, d),
        "key": normal(batch, kv, length, d),
        "value": normal(batch, kv, length, v),
        "delta": normal(batch, kv, length, v) - 2,
        "a": -normal(kv, v, d).exp(),
        "skip": normal(kv, v),
        "gate": normal(batch, heads, length, v),
        "delta_bias": normal(kv, v),
    }


def gradients(fn, inputs: dict[str, Tensor], **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = {k: t.clone().requires_grad_() for k, t in inputs.items()}
    out = fn(**leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad((out * weight).sum(), list(leaves.values()))


@pytest.mark.parametrize("kv", [1, 4])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 63, 100])
def test_every_option_and_chunk_size(kv, chunk_size) -> None:
    """Skip, gate, bias and shared key heads: outputs and every gradient."""
    inputs = draw(heads=4, kv=kv)
    out, grads = gradients(mamba, inputs, chunk_size=chunk_size, implementation="chunked")
    expected, expected_grads = gradients(mamba_reference, inputs)
    assert_close(out, expected, 1e-12)
    for name, grad, wanted in zip(inputs, grads, expected_grads, strict=True):
        assert_close(grad, wanted, 1e-11, name)


def test_the_state_carries_gradients() -> None:
    """Both ways: into the first state, and out of the last one."""
    inputs, first = draw(), torch.randn(2, 2, 7, 5, dtype=torch.float64)
    weight = torch.randn_like(first)
    results = []
    for implementation in ("chunked", "recurrent"):
        leaves = {k: t.clone().requires_grad_() for k, t in (inputs | {"first": first}).items()}
        state = MambaState(leaves["first"])
        rest = {k: t for k, t in leaves.items() if k != "first"}
        out, state = mamba_update(state, **rest, implementation=implementation)
        total = (out**2).sum() + (state.memory * weight).sum()
        results.append((out, *torch.autograd.grad(total, list(leaves.values()))))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-11)


def scan_by_hand(u, delta, a, b, c, *, d, z, delta_bias) -> tuple[Tensor, Tensor]:
    """The official layout, written out per group: b and c (B, G, N, L)."""
    delta = F.softplus(delta + delta_bias[:, None])
    b, c = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (b, c))  # (B, E, N, L)
    state, outputs = u.new_zeros(*u.shape[:2], a.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = (step * a).exp() * state + step * b[..., t] * u[:, :, t, None]
        outputs.append((state * c[..., t]).sum(-1))
    return (torch.stack(outputs, -1) + d[:, None] * u) * F.silu(z), state


@pytest.mark.parametrize("groups", [1, 3])
def test_the_official_layout(groups) -> None:
    u, delta, z = torch.randn(3, 2, 12, 21).double()
    a, (d, bias) = -torch.rand(12, 4).double(), torch.randn(2, 12).double()
    b, c = torch.randn(2, 2, groups, 4, 21).double()
    options = {"d": d, "z": z, "delta_bias": bias}
    expected, last = scan_by_hand(u, delta, a, b, c, **options)
    if groups == 1:
        b, c = b[:, 0], c[:, 0]
    y, state = selective_scan(u, delta, a, b, c, delta_softplus=True, **options)
    assert_close(y, expected, 1e-12)
    assert_close(state, last, 1e-12)
    cut = 13
    _, first = selective_scan(
        u[..., :cut], delta[..., :cut], a, b[..., :cut], c[..., :cut],
        d=d, z=z[..., :cut], delta_bias=bias, delta_softplus=True,
    )  # fmt: skip
    rest, end = selective_scan(
        u[..., cut:], delta[..., cut:], a, b[..., cut:], c[..., cut:],
        d=d, z=z[..., cut:], delta_bias=bias, delta_softplus=True, initial_state=first,
    )  # fmt: skip
    assert_close(rest, expected[..., cut:], 1e-12)
    assert_close(end, last, 1e-12)


def test_without_decay_it_is_linear_attention() -> None:
    """a = 0 and steps of 1: y = (C Bᵀ, lower triangle) x."""
    t = draw()
    out = mamba(
        t["query"], t["key"], t["value"], torch.ones_like(t["delta"]), torch.zeros_like(t["a"]),
        delta_softplus=False,
    )  # fmt: skip
    assert_close(out, (t["query"] @ t["key"].mT).tril() @ t["value"], 1e-12)


def test_a_huge_step_forgets_everything_before() -> None:
    t = {k: x.float() for k, x in draw().items()}
    delta = torch.full_like(t["delta"], 1e-2)
    delta[:, :, 30] = 1e5
    args = (t["query"], t["key"], t["value"] * 1e-5, delta, t["a"])
    out = mamba(*args, delta_softplus=False)
    alone = mamba(*(x[:, :, 30:] if x.ndim == 4 else x for x in args), delta_softplus=False)
    assert_close(out[:, :, 30:], alone, 1e-6)


def test_states_stay_wide_in_half_precision() -> None:
    inputs = {k: t.bfloat16() for k, t in draw(length=40).items()}
    out, state = mamba_update(None, **inputs)
    assert out.dtype == torch.bfloat16
    assert state.memory.dtype == torch.float32
    last = {k: t[:, :, 0] if t.ndim == 4 else t for k, t in inputs.items()}
    out, state = mamba_step(state, **last)
    assert (out.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)


def test_states_of_all_tokens_never_exist_at_once() -> None:
    """(B, E, L, N) is 16 times u here; a third of it would break the bounds."""
    u, delta = torch.randn(2, 1, 256, 1024)
    b, c = torch.randn(2, 1, 16, 1024)
    leaves = [t.requires_grad_() for t in (u, delta, -torch.rand(256, 16), b, c)]

    def run() -> Tensor:
        return selective_scan(*leaves, delta_softplus=True)[0]

    unit = u.numel() * 4
    with torch.no_grad():
        forward = peak_memory(run)
    trained = peak_memory(lambda: run().sum().backward())
    assert forward.largest_tensor_bytes <= 1.1 * unit
    assert forward.peak_bytes < 4 * unit
    assert trained.largest_tensor_bytes <= 1.1 * unit
    assert trained.peak_bytes < 9 * unit


def test_step_does_not_change_its_state() -> None:
    inputs = draw()
    _, state = mamba_update(None, **inputs)
    before = state.memory.clone()
    mamba_step(state, **{k: t[:, :, 0] if t.ndim == 4 else t for k, t in inputs.items()})
    assert torch.equal(state.memory, before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_heads": 4, "state_dim": 3},
        {"expand": 1.5, "dt_rank": 7},
        {"conv_size": 1},
        {"conv_bias": False, "proj_bias": True},
        {"dt_init": "constant", "dt_scale": 2.0},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_the_layer(options) -> None:
    layer = MambaMixer(MambaConfig(embed_dim=40, **options)).double()
    x, mask = torch.randn(2, 50, 40).double(), torch.ones(2, 50, dtype=torch.bool)
    mask[0, :11] = False
    mask[1, 4:6] = False
    y = layer(x, mask=mask)
    first, state = layer.update(x[:, :20], layer.init_state(2), mask=mask[:, :20])
    second, state = layer.update(x[:, 20:49], state)
    last, _ = layer.step(x[:, 49], state)
    assert_close(torch.cat((first, second, last[:, None]), 1)[mask], y[mask], 1e-9)
    packed = torch.cat((x[0, mask[0]], x[1, mask[1]]))[None]
    both = layer(packed, cu_seqlens=torch.tensor([0, 39, 87]))
    assert_close(both[0], y[mask], 1e-9)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_heads": 4, "state_dim": 3},
        {"expand": 1.5, "dt_rank": 7, "state_dim": 21},
        {"conv_size": 1},
        {"conv_bias": False, "proj_bias": True},
    ],
    ids=lambda o: next(iter(o), "published"),
)
def test_a_token_by_the_kernel_is_a_token_by_torch(options, batch, monkeypatch) -> None:
    monkeypatch.setattr(token, "_LEAST", 0)
    layer = MambaMixer(MambaConfig(embed_dim=44, **options))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
        exact = copy.deepcopy(layer).double()
        x = torch.randn(batch, 25, 44)
        _, state = layer.update(x[:, :21], layer.init_state(batch))
        _, wide = exact.update(x[:, :21].double(), exact.init_state(batch))
        for t in range(21, 25):
            before = [s.clone() for s in state]
            found = token.block_step(layer, x[:, t], state.conv, state.ssm)
            assert found is not None
            y, after = layer.step(x[:, t], state)
            assert all(torch.equal(a, b) for a, b in zip(found, (y, *after), strict=True))
            assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
            z, wide = exact.step(x[:, t].double(), wide)
            for a, b in zip((y, *after), (z, *wide), strict=True):
                assert a.shape == b.shape
                assert_close(a, b.float(), 2e-5)
            state = after


@pytest.mark.parametrize("why", ["grad", "double", "hook", "swapped", "rows", "small", "width"])
def test_who_looks_on_gets_operators_of_torch(why, monkeypatch) -> None:
    if why != "small":
        monkeypatch.setattr(token, "_LEAST", 0)
    layer = MambaMixer(MambaConfig(embed_dim=44))
    batch = 9 if why == "rows" else 2
    state, x = layer.init_state(batch), torch.randn(batch, 44)
    seen: list[Tensor] = []
    if why == "double":
        layer, x = layer.double(), x.double()
        state = layer.init_state(batch)
    elif why == "hook":
        layer.x_proj.register_forward_hook(lambda *given: seen.append(given[2]))
    elif why == "swapped":
        layer.out_proj = torch.nn.Sequential(layer.out_proj)
    elif why == "width":
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), torch.no_grad():
            layer.step(x[:, 1:], state)
    with torch.set_grad_enabled(why == "grad"):
        if why == "width":
            x = x[:, 1:]
        assert token.block_step(layer, x, state.conv, state.ssm) is None
        if why == "width":
            return
        y, _ = layer.step(x, state)
    assert y.requires_grad == (why == "grad")
    assert len(seen) == (why == "hook")


def test_the_state_is_the_official_cache() -> None:
    """The convolution's last W inputs, newest last, of real tokens; zeros before the first."""
    layer = MambaMixer(MambaConfig(embed_dim=20)).double()
    x, mask = torch.randn(2, 9, 20).double(), torch.ones(2, 9, dtype=torch.bool)
    mask[1, :6] = False
    mask[0, 7] = False
    _, state = layer.update(x, layer.init_state(2), mask=mask)
    inner = layer.in_proj(x)[..., :40].mT
    assert state.conv.shape == (2, 40, 4)
    assert state.ssm.shape == (2, 40, 16)
    assert_close(state.conv[0], inner[0][:, [4, 5, 6, 8]], 1e-12)
    assert_close(state.conv[1, :, 1:], inner[1][:, 6:], 1e-12)
    assert (state.conv[1, :, 0] == 0).all()


def test_a_prefilled_state_does_not_keep_the_sequence_alive() -> None:
    layer = MambaMixer(MambaConfig(embed_dim=20))
    _, state = layer.update(torch.randn(1, 500, 20), layer.init_state(1))
    assert state.conv.untyped_storage().nbytes() == state.conv.numel() * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_leaves_the_rates_wide(device) -> None:
    layer = MambaMixer(MambaConfig(embed_dim=20))
    rates, skip = layer.a_log.clone(), layer.skip.clone()
    layer = layer.to(device).bfloat16()
    assert layer.in_proj.weight.dtype == torch.bfloat16
    assert layer.a_log.dtype == layer.skip.dtype == torch.float32
    assert isinstance(layer.a_log, torch.nn.Parameter)
    if device == "cpu":
        assert torch.equal(layer.a_log, rates)
        assert torch.equal(layer.skip, skip)
        assert layer(torch.randn(1, 30, 20).bfloat16()).dtype == torch.bfloat16
        state = layer.init_state(1)
        assert (state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.float32)
    assert layer.double().a_log.dtype == torch.float64


def test_a_new_layer_starts_as_published() -> None:
    layer = MambaMixer(MambaConfig(embed_dim=256, dt_min=0.02, dt_max=0.05))
    steps = F.softplus(layer.dt_proj.bias)
    assert steps.min() * 1.0001 >= 0.02
    assert steps.max() <= 0.05 * 1.0001
    assert 0.028 < steps.log().mean().exp() < 0.035  # log-uniform
    assert layer.dt_proj.weight.abs().max() <= 16**-0.5
    expected = torch.arange(1.0, 17).expand(512, -1)
    assert_close(layer.a_log.exp(), expected, 1e-6)
    assert (layer.skip == 1).all()


def test_a_convolution_holds_as_many_inputs_as_asked() -> None:
    short, long = ShortConv(6, 4), ShortConv(6, 4, memory=7)
    long.load_state_dict(short.state_dict())
    x = torch.randn(2, 20, 6)
    y, _ = short(x)
    first, state = long(x[:, :9])
    second, state = long(x[:, 9:], state)
    assert_close(torch.cat((first, second), 1), y, 1e-6)
    assert torch.equal(state, x[:, 13:])
    with pytest.raises(ValueError, match="memory 2 is too short"):
        ShortConv(6, 4, memory=2)


def test_errors_name_the_fix() -> None:
    t = draw()
    with pytest.raises(ValueError, match="one step for each token"):
        mamba(**t | {"delta": t["delta"][..., :1]})
    with pytest.raises(ValueError, match="one decay rate"):
        mamba(**t | {"a": t["a"].mT})
    with pytest.raises(ValueError, match="skip has shape"):
        mamba(**t | {"skip": t["skip"][0]})
    with pytest.raises(ValueError, match="gate has shape"):
        mamba(**t | {"gate": t["gate"][:1]})
    with pytest.raises(ValueError, match="chunked"):
        mamba(**t, implementation="chunks")
    with pytest.raises(ValueError, match="chunk_size 0"):
        mamba(**t, chunk_size=0)
    with pytest.raises(ValueError, match="not both"):
        mamba(**t, mask=torch.ones(2, 63).bool(), cu_seqlens=torch.tensor([0, 63]))
    u, b = torch.randn(1, 8, 5), torch.randn(1, 3, 2, 5)
    with pytest.raises(ValueError, match="8 channels are not a multiple of 3 groups"):
        selective_scan(u, u, -torch.ones(8, 2), b, b)
    with pytest.raises(ValueError, match="expand a constant one"):
        selective_scan(u, u, -torch.ones(8, 2), torch.ones(8, 2), b)
    with pytest.raises(ValueError, match="complex"):
        selective_scan(u, u, torch.ones(8, 2, dtype=torch.complex64), b, b)
    with pytest.raises(ValueError, match="no bidirectional form"):
        MambaConfig(embed_dim=40, is_causal=False)
    with pytest.raises(ValueError, match="num_heads 3"):
        MambaConfig(embed_dim=40, num_heads=3)
    with pytest.raises(ValueError, match="dt_init"):
        MambaConfig(embed_dim=40, dt_init="zero")
