"""What every registered mechanism keeps: to be registered is to be tested."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compare import assert_close, relative_error
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import peak_memory
from manyheads.layers.state import clone_state, reorder_state, state_tensors
from manyheads.registry import Mechanism, Shape, get_mechanism, list_mechanisms

NAMES = list_mechanisms()
MODES = [
    pytest.param(name, causal, id=f"{name}-{'causal' if causal else 'bidirectional'}")
    for name in NAMES
    for causal in (True, False)
    if (get_mechanism(name).causal if causal else get_mechanism(name).bidirectional)
]
STREAMING = [n for n in NAMES if get_mechanism(n).update is not None]
HEADS, DIM, LENGTH = 3, 20, 63


def draw(m: Mechanism, causal: bool, *, batch: int = 1, length: int = LENGTH, **kwargs):
    shape = Shape(batch=batch, heads=HEADS, length=length, head_dim=DIM, is_causal=causal, **kwargs)
    inputs = m.inputs(shape, torch.Generator().manual_seed(length + batch))
    return {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}


def call(m: Mechanism, inputs, causal: bool, *, reference: bool = False, **kwargs) -> Tensor:
    fn = m.reference if reference else m.function
    if "is_causal" in inspect.signature(fn).parameters:
        kwargs["is_causal"] = causal
    out = fn(**inputs, **kwargs)
    assert isinstance(out, Tensor), "a function and its reference return one tensor"
    return out


def is_sequence(t: Tensor, length: int) -> bool:
    return t.ndim == 4 and t.shape[2] == length


def cut(inputs, length: int, part: slice):
    return {k: t[:, :, part] if is_sequence(t, length) else t for k, t in inputs.items()}


def masks(length: int) -> Tensor:
    """Three rows: padded left, padded right, padded on both sides with a hole."""
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, : length // 4] = False
    mask[1, length - length // 3 :] = False
    mask[2, :5] = mask[2, -7:] = mask[2, 20:23] = False
    return mask


def build(m: Mechanism, causal: bool, **options):
    config = m.config(embed_dim=HEADS * DIM, num_heads=HEADS, is_causal=causal, **options)
    return m.module(config).eval()


@pytest.mark.parametrize(("name", "causal"), MODES)
@pytest.mark.parametrize(
    ("batch", "length", "masked"),
    [(1, 1, False), (1, 130, False), (3, LENGTH, False), (3, LENGTH, True)],
)
def test_fast_form_is_the_reference(name, causal, batch, length, masked) -> None:
    """Outputs and every gradient, in float64."""
    m = get_mechanism(name)
    mask = masks(length) if masked else None
    results = []
    for reference in (False, True):
        inputs = {
            k: t.requires_grad_() for k, t in draw(m, causal, batch=batch, length=length).items()
        }
        out = call(m, inputs, causal, reference=reference, mask=mask)
        if mask is not None:
            out = out * mask[:, None, :, None]
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).double()
        used = {k: t for k, t in inputs.items() if t.is_floating_point()}
        grads = torch.autograd.grad((out * cotangent).sum(), list(used.values()), allow_unused=True)
        results.append((out, dict(zip(used, grads, strict=True))))
    (out, grads), (expected, expected_grads) = results
    assert_close(out, expected, 1e-9, "output")
    for k, grad in expected_grads.items():
        if grad is None or float(grad.abs().max()) < 1e-12:
            assert grads[k] is None or float(grads[k].abs().max()) < 1e-9
            continue
        assert_close(grads[k], grad, 1e-8, f"gradient of {k}")


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_float32_is_close_to_float64(name, causal) -> None:
    m = get_mechanism(name)
    inputs = draw(m, causal, batch=2, length=257)
    narrow = {k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}
    out = call(m, narrow, causal)
    assert out.dtype == torch.float32
    assert_close(out, call(m, inputs, causal, reference=True), 2e-5)


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_half_precision_in_and_out(name, causal) -> None:
    m = get_mechanism(name)
    inputs = draw(m, causal, batch=2)
    half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in inputs.items()}
    out = call(m, half, causal)
    assert out.dtype == torch.bfloat16
    exact = call(
        m, {k: t.double() if t.is_floating_point() else t for k, t in half.items()}, causal
    )
    assert_close(out, exact, 2e-2)


@pytest.mark.parametrize("name", [n for n in NAMES if get_mechanism(n).causal])
@pytest.mark.parametrize("place", [0, 16, 61])
def test_no_look_ahead(name, place) -> None:
    m = get_mechanism(name)
    inputs = draw(m, True, batch=2)
    changed = {
        k: torch.cat((t[:, :, : place + 1], torch.randn_like(t[:, :, place + 1 :])), 2)
        if is_sequence(t, LENGTH) and k != "log_decay"
        else t
        for k, t in inputs.items()
    }
    out, other = call(m, inputs, True), call(m, changed, True)
    assert_close(other[:, :, : place + 1], out[:, :, : place + 1], 1e-9)
    if place + 1 < LENGTH:
        assert relative_error(other[:, :, place + 1 :], out[:, :, place + 1 :]) > 1e-3


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_padding_changes_no_real_token(name, causal) -> None:
    m = get_mechanism(name)
    inputs = draw(m, causal, batch=3)
    mask = masks(LENGTH)
    out = call(m, inputs, causal, mask=mask)
    assert torch.isfinite(out).all()
    for row in range(3):
        alone = {
            k: t[row : row + 1][:, :, mask[row]] if is_sequence(t, LENGTH) else t
            for k, t in inputs.items()
        }
        assert_close(
            out[row : row + 1][:, :, mask[row]], call(m, alone, causal), 1e-9, f"row {row}"
        )
        if causal:
            assert (out[row][:, ~mask[row]] == 0).all(), "padded outputs are 0"


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_packing_changes_no_token(name, causal) -> None:
    m = get_mechanism(name)
    inputs = draw(m, causal)
    borders = [0, 7, 8, 8, 40, LENGTH]
    packed = call(m, inputs, causal, cu_seqlens=torch.tensor(borders))
    for a, b in pairwise(borders):
        if a < b:
            alone = call(m, cut(inputs, LENGTH, slice(a, b)), causal)
            assert_close(packed[:, :, a:b], alone, 1e-9, f"sequence {a}:{b}")


@pytest.mark.parametrize("name", STREAMING)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_split_gives_the_same_outputs(name, data) -> None:
    """Blocks and single tokens in any order equal one call, outputs and state."""
    m = get_mechanism(name)
    inputs = draw(m, True, batch=2)
    cuts = data.draw(st.lists(st.integers(0, LENGTH), max_size=5))
    borders = [0, *sorted(cuts), LENGTH]
    fixed = {k: t for k, t in inputs.items() if not is_sequence(t, LENGTH)}
    state, parts = None, []
    for a, b in pairwise(borders):
        if a == b:
            continue
        block = cut(inputs, LENGTH, slice(a, b))
        if b - a == 1 and state is not None:
            tokens = {k: t[:, :, 0] for k, t in block.items() if k not in fixed}
            out, state = m.step(state, **tokens, **fixed)
            out = out[:, :, None]
        else:
            out, state = m.update(state, **block)
        parts.append(out)
    assert_close(torch.cat(parts, 2), call(m, inputs, True), 1e-9)
    _, whole = m.update(None, **inputs)
    if m.constant_state:
        for a, b in zip(state_tensors(state), state_tensors(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def stated(m: Mechanism, causal: bool, length: int):
    shape = Shape(batch=2, heads=HEADS, length=length, head_dim=DIM, is_causal=causal)
    inputs = m.inputs(shape, torch.Generator().manual_seed(0))
    return shape, lambda: call(m, inputs, causal)


@pytest.mark.parametrize(("name", "causal"), MODES)
@pytest.mark.parametrize("length", [256, 300])
def test_the_counter_finds_the_stated_flops(name, causal, length) -> None:
    m = get_mechanism(name)
    shape, run = stated(m, causal, length)
    counted = count_flops(run)
    assert counted.total == m.flops(shape)
    assert m.bytes_moved(shape) >= 4 * 2 * HEADS * length * DIM


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_memory_is_as_stated_and_not_quadratic(name, causal) -> None:
    """Nothing of the size of N x N a head is made, forward or backward."""
    m = get_mechanism(name)
    shape, run = stated(m, causal, 2048)
    with torch.no_grad():
        peak = peak_memory(run)
    assert peak.peak_bytes <= 2.5 * 4 * m.memory_numbers(shape)
    assert peak.largest_tensor_bytes < 4 * 2048 * 2048
    inputs = {
        k: t.requires_grad_() if t.is_floating_point() else t for k, t in m.inputs(shape).items()
    }
    trained = peak_memory(lambda: call(m, inputs, causal).sum().backward())
    assert trained.largest_tensor_bytes < 4 * 2048 * 2048


@pytest.mark.parametrize("name", STREAMING)
def test_state_has_the_stated_size(name) -> None:
    m = get_mechanism(name)
    shape = Shape(batch=2, heads=HEADS, length=LENGTH, head_dim=DIM)
    _, state = m.update(None, **m.inputs(shape))
    held = sum(t.numel() for t in state_tensors(state) if t.is_floating_point())
    assert held == m.state_numbers(shape)
    if m.constant_state:
        longer = Shape(batch=2, heads=HEADS, length=5 * LENGTH, head_dim=DIM)
        _, state = m.update(None, **m.inputs(longer))
        assert sum(t.numel() for t in state_tensors(state) if t.is_floating_point()) == held


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_extremes_are_finite(name, causal) -> None:
    """Huge scores, zeros, equal tokens and rows without a real token; forward and backward."""
    m = get_mechanism(name)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1] = False
    for factor in (0.0, 1.0, 1e3):
        inputs = {
            k: (t.float() * factor).requires_grad_() if t.is_floating_point() else t
            for k, t in draw(m, causal, batch=2).items()
        }
        out = call(m, inputs, causal, mask=mask)
        assert torch.isfinite(out).all(), f"output at factor {factor}"
        assert (out[1] == 0).all()
        leaves = {k: t for k, t in inputs.items() if t.requires_grad}
        grads = torch.autograd.grad(out.square().mean(), list(leaves.values()), allow_unused=True)
        for k, grad in zip(leaves, grads, strict=True):
            assert grad is None or torch.isfinite(grad).all(), f"gradient of {k} at factor {factor}"


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_bad_shapes_name_the_axis(name, causal) -> None:
    m = get_mechanism(name)
    inputs = draw(m, causal)
    with pytest.raises(ValueError, match=r"length|mask"):
        call(m, inputs, causal, mask=torch.ones(1, LENGTH + 1, dtype=torch.bool))
    short = dict(inputs, value=inputs["value"][:, :, :-1])
    with pytest.raises(ValueError, match="length"):
        call(m, short, causal)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(m, inputs, causal, cu_seqlens=torch.tensor([0, 10, 5, LENGTH]))


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_module_trains_every_parameter(name, causal) -> None:
    module = build(get_mechanism(name), causal).train()
    x = torch.randn(2, LENGTH, HEADS * DIM, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    (y * torch.randn_like(y)).sum().backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().sum() > 0, f"{key} gets no gradient"
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_module_is_blind_to_padding_packing_and_batching(name, causal) -> None:
    module = build(get_mechanism(name), causal).double()
    x, mask = torch.randn(3, LENGTH, HEADS * DIM).double(), masks(LENGTH)
    y = module(x, mask=mask)
    rows = [module(x[i : i + 1, mask[i]]) for i in range(3)]
    for i, row in enumerate(rows):
        assert_close(y[i : i + 1, mask[i]], row, 1e-9, f"row {i}")
    packed = torch.cat([x[i, mask[i]] for i in range(3)])[None]
    lengths = torch.tensor([0, *mask.sum(1).tolist()]).cumsum(0)
    assert_close(module(packed, cu_seqlens=lengths), torch.cat(rows, 1), 1e-9, "packed")


@pytest.mark.parametrize("name", STREAMING)
def test_module_streams(name) -> None:
    """forward == update in blocks == steps, with padding, and rows can be reordered."""
    module = build(get_mechanism(name), True).double()
    x, mask = torch.randn(3, LENGTH, HEADS * DIM).double(), masks(LENGTH)
    mask[:, 40:] = True
    with torch.no_grad():
        y = module(x, mask=mask)
        first, state = module.update(x[:, :25], module.init_state(3), mask=mask[:, :25])
        second, state = module.update(x[:, 25:50], state, mask=mask[:, 25:50])
        branch = clone_state(state)
        steps = []
        for t in range(50, LENGTH):
            out, state = module.step(x[:, t], state)
            steps.append(out)
        streamed = torch.cat((first, second, torch.stack(steps, 1)), 1)
        assert_close(streamed[mask], y[mask], 1e-9)
        order = torch.tensor([2, 0, 0])
        out, _ = module.step(x[order, 50], reorder_state(branch, order))
        assert_close(out, y[order, 50], 1e-9)


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_module_compiles_without_graph_breaks(name, causal) -> None:
    module = build(get_mechanism(name), causal)
    x = torch.randn(2, LENGTH, HEADS * DIM, requires_grad=True)
    expected = module(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    assert_close(out, expected, 1e-5)
    assert_close(grad, expected_grad, 1e-4)


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_module_builds_on_meta_and_from_its_config(name, causal) -> None:
    m = get_mechanism(name)
    config = m.config(embed_dim=HEADS * DIM, num_heads=HEADS, is_causal=causal)
    assert m.config.from_json(config.to_json()) == config
    with torch.device("meta"):
        assert all(p.is_meta for p in m.module(config).parameters())
    with pytest.raises(ValueError, match="embed_dim"):
        m.config.from_dict({"embed_dims": 3})


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_official_names_go_both_ways(name, causal) -> None:
    m = get_mechanism(name)
    module, other = build(m, causal), build(m, causal)
    other.load_official(module.to_official())
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
    broken = module.to_official()
    name_, tensor = broken.popitem()
    broken[name_ + "x"] = tensor
    with pytest.raises(ValueError, match="missing"):
        other.load_official(broken)


@pytest.mark.parametrize(("name", "causal"), MODES)
def test_autocast_keeps_states_wide(name, causal) -> None:
    module = build(get_mechanism(name), causal)
    x = torch.randn(2, LENGTH, HEADS * DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert torch.isfinite(y).all()
    assert relative_error(y, module(x)) < 5e-2
