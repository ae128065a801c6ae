"""The scan's kernels against the definition in float64, forward, backward and by the token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from manyheads.native import disabled, library
from native.calls_scan import SHAPES, inputs

pytestmark = pytest.mark.skipif(
    library("scan") is None, reason="no C++ compiler: there are no kernels to test"
)


def narrow(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float32, with the strides they had."""
    return {k: torch.empty_like(t, dtype=torch.float32).copy_(t) for k, t in given.items()}


def run(fn, given: dict[str, Tensor | None], **options):
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in given.items()}
    out = fn(**leaves, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [t for t in leaves.values() if t is not None]
    grads = torch.autograd.grad((out * weight.to(out)).sum(), wanted)
    return [out.detach(), *grads]


def compare(given: dict[str, Tensor], *, without: tuple[str, ...] = (), **options) -> None:
    """Outputs and every gradient of the kernels in float32, of the definition in float64."""
    gone = dict.fromkeys(without)
    chunk_size = options.pop("chunk_size", 32)
    own = run(
        mamba, narrow(given) | gone, implementation="native", chunk_size=chunk_size, **options
    )
    wanted = run(mamba_reference, given | gone, **options)
    names = ["output", *(k for k in given if k not in without)]
    for name, a, b in zip(names, own, wanted, strict=True):
        if b.numel():
            assert torch.isfinite(a).all(), name
            assert_close(a.double(), b, 1e-5, name)


@pytest.mark.parametrize("layout", ["heads", "tokens", "channels"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3]], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_outputs_and_gradients(shape, layout, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(inputs(shape, layout=layout))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("size", range(4))
def test_without_some_of_the_options(size) -> None:
    for without in itertools.combinations(("skip", "gate", "delta_bias"), size):
        compare(inputs((2, 2, 2, 37, 6, 19)), without=without)
    given = inputs((2, 2, 2, 37, 16, 19))
    given["delta"] = given["delta"].abs()
    given["delta_bias"] = given["delta_bias"].abs()
    compare(given, delta_softplus=False)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]), st.integers(1, 80),
        st.integers(3, 20), st.integers(5, 50),
    ),
    layout=st.sampled_from(["heads", "tokens", "channels"]),
    chunk_size=st.integers(1, 90),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape(sizes, layout, chunk_size, masked, seed) -> None:
    batch, (heads, kv), length, states, channels = sizes
    given = inputs((batch, heads, kv, length, states, channels), seed=seed, layout=layout)
    mask = None
    if masked:
        mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3
    compare(given, chunk_size=chunk_size, mask=mask)


def test_padding_may_hold_anything() -> None:
    given = narrow(inputs((2, 2, 2, 30, 16, 19)))
    mask = torch.rand(2, 30) > 0.4
    wanted = run(mamba, given, mask=mask, implementation="native")
    drop = ~mask[:, None, :, None]
    dirty = {k: t.masked_fill(drop, torch.nan) if t.ndim == 4 else t for k, t in given.items()}
    for a, b in zip(run(mamba, dirty, mask=mask, implementation="native"), wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factor", [0.0, 1.0, 1e3, 1e8])
def test_extremes_are_as_in_the_definition(factor) -> None:
    """Steps that keep everything, steps that forget everything at once."""
    given = inputs((1, 1, 1, 50, 16, 33))
    given["delta"] = given["delta"].abs() * factor
    given["value"] = given["value"] / max(factor, 1)
    given["delta_bias"] = given["delta_bias"].abs()
    compare(given, delta_softplus=False)


def test_the_same_every_time_and_for_the_padded_lanes() -> None:
    given = narrow(inputs((1, 1, 1, 200, 16, 117)))
    first = run(mamba, given, implementation="native")
    for a, b in zip(run(mamba, given, implementation="native"), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token(shape) -> None:
    given = inputs(shape)
    memory = torch.randn(shape[0], shape[1], shape[5], shape[4], dtype=torch.float64)
    token = {k: t[:, :, 0] if t.ndim == 4 else t for k, t in given.items()}
    with torch.no_grad():
        out, state = mamba_step(
            MambaState(memory.float()), **{k: t.float() for k, t in token.items()}
        )
        wanted, after = mamba_step(MambaState(memory), **token)
    if wanted.numel() and shape[4]:
        assert_close(out.double(), wanted, 1e-5)
        assert_close(state.memory.double(), after.memory, 1e-5)


def test_an_empty_batch_or_length() -> None:
    for shape in ((0, 1, 1, 7, 16, 16), (2, 1, 1, 0, 16, 16), (1, 1, 1, 7, 16, 0)):
        out, state = mamba_update(None, **narrow(inputs(shape)), implementation="native")
        assert out.shape == (shape[0], 1, shape[3], shape[5])
        assert (state.memory == 0).all()


def test_the_official_layout_is_read_as_it_lies() -> None:
    u, delta, z = torch.randn(3, 2, 24, 50)
    a, b, c = -torch.rand(24, 16), torch.randn(2, 16, 50), torch.randn(2, 16, 50)
    y, state = selective_scan(u, delta, a, b, c, z=z, delta_softplus=True)
    wide = [t.double() for t in (u, delta, a, b, c)]
    wanted, last = selective_scan(*wide, z=z.double(), delta_softplus=True)
    assert_close(y.double(), wanted, 1e-5)
    assert_close(state.double(), last, 1e-5)


def test_compiled_and_exported_graphs_hold_the_operator() -> None:
    layer = MambaMixer(MambaConfig(embed_dim=24)).eval()
    x = torch.randn(2, 40, 24)
    wanted = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), wanted, 1e-5)
    compiled(x).sum().backward()
    assert layer.a_log.grad is not None
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("mamba_scan" in name for name in names)
    longer = torch.randn(2, 77, 24)
    assert_close(program.module()(longer), layer(longer), 1e-5)
    with disabled():  # what was exported does not depend on a compiler
        assert_close(program.module()(longer), layer(longer), 1e-5)


def test_the_operators_pass_torchs_own_checks() -> None:
    given = narrow(inputs((2, 1, 1, 9, 4, 5)))
    rest = (given["skip"], given["gate"], given["delta_bias"], torch.rand(2, 9) > 0.3)
    args = [given[n].requires_grad_() for n in ("query", "key", "value", "delta")]
    args += [given["a"].mT.contiguous().requires_grad_(), torch.randn(2, 1, 4, 5)]
    torch.library.opcheck(torch.ops.manyheads.mamba_scan, (*args, *rest, True, 4, True, True))


def test_native_is_said_when_it_cannot_be_had() -> None:
    given = narrow(inputs((1, 1, 1, 9, 4, 5)))
    with disabled(), pytest.raises(RuntimeError, match="switched off"):
        mamba(**given, implementation="native")
    with pytest.raises(RuntimeError, match="float32 on the CPU"):
        mamba(**{k: t.double() for k, t in given.items()}, implementation="native")
