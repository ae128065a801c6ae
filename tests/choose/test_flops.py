"""FLOP counts against closed forms, and honesty about what has none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from manyheads.choose.flop_formulas import FORMULAS, TRANSPARENT
from manyheads.choose.flops import FlopCounter, UncountedError, count_flops, register_flops
from manyheads.registry import get_mechanism

torch.set_num_threads(1)

SDPA = "aten::_scaled_dot_product_flash_attention_for_cpu"


def torch_count(fn: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as mode:
        fn()
    return mode.get_total_flops()


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(fn(*inputs).sum(), inputs)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


size = st.integers(2, 9)  # over an axis of length 1 einsum multiplies, and sums nothing


@settings(max_examples=30, deadline=None)
@given(b=size, m=size, k=size, n=size)
def test_products(b: int, m: int, k: int, n: int) -> None:
    x, y, bias = torch.randn(b, m, k), torch.randn(b, k, n), torch.randn(m, n)
    flat, flat_y, vector = torch.randn(m, k), torch.randn(k, n), torch.randn(k)
    one = 2 * m * k * n
    expected: list[tuple[int, list[Callable[[], Any]]]] = [
        (one, [lambda: flat @ flat_y, lambda: torch.addmm(bias, flat, flat_y)]),
        (
            b * one,
            [
                lambda: x @ y,
                lambda: torch.baddbmm(bias.expand(b, m, n), x, y),
                lambda: torch.addbmm(bias, x, y),
                lambda: torch.einsum("bmk,bkn->bnm", x, y),
            ],
        ),
        (2 * m * k, [lambda: flat @ vector, lambda: torch.addmv(flat[:, 0], flat, vector)]),
        (2 * k, [lambda: vector @ vector, lambda: torch.vdot(vector, vector)]),
        (2 * m * n, [lambda: torch.addr(bias, flat[:, 0], flat_y[0])]),
    ]
    for flops, calls in expected:
        for call in calls:
            assert count_flops(call).total == flops


def test_products_agree_with_torch_where_torch_knows_them() -> None:
    model = nn.Sequential(nn.Linear(20, 63), nn.GELU(), nn.Linear(63, 20))
    x = torch.randn(3, 7, 20)
    call = lambda: model(x).square().sum().backward()  # noqa: E731
    assert count_flops(call).total == torch_count(call) > 0
    matrix, vector = torch.randn(9, 5), torch.randn(5)
    assert torch_count(lambda: matrix @ vector) == 0  # which is why ours counts it


def test_complex_products_are_four_times_as_many() -> None:
    x = torch.randn(9, 7, dtype=torch.complex64)
    assert count_flops(lambda: x @ x.mT).total == 8 * 9 * 7 * 9


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 3), h=st.integers(1, 3), n=size, m=size, d=size, causal=st.booleans())
def test_cpu_attention(b: int, h: int, n: int, m: int, d: int, causal: bool) -> None:
    q, k, v = leaves((b, h, n, d), (b, h, m, d), (b, h, m, d))
    pairs = sum(min(i + 1, m) for i in range(n)) if causal else n * m
    forward = 2 * b * h * pairs * 2 * d
    attend = lambda *t: F.scaled_dot_product_attention(*t, is_causal=causal)  # noqa: E731
    count = count_flops(gradients(attend, q, k, v))
    assert count.by_operator == {SDPA: forward, SDPA + "_backward": forward * 5 // 2}


def test_torch_counts_cpu_attention_as_nothing_and_ours_does_not() -> None:
    b, h, n, d = 1, 3, 63, 20
    q, k, v = leaves(*[(b, h, n, d)] * 3)
    fused = gradients(F.scaled_dot_product_attention, q, k, v)
    plain = gradients(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, q, k, v)
    assert torch_count(fused) == 0
    scores_again = 2 * b * h * n * n * d
    assert count_flops(fused).total == count_flops(plain).total + scores_again
    causal = count_flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert causal.total == 2 * b * h * (n * (n + 1) // 2) * 2 * d
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    masked = count_flops(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert masked.total == 2 * b * h * n * n * 2 * d


def test_grouped_and_unequal_heads() -> None:
    q, k = torch.randn(1, 6, 63, 20), torch.randn(1, 2, 63, 20)
    count = count_flops(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
    assert count.total == 2 * 6 * 63 * 63 * 40
    wide = torch.randn(1, 6, 63, 31)  # another value width: torch takes plain products
    count = count_flops(lambda: F.scaled_dot_product_attention(q, q, wide))
    assert count.total == 2 * 6 * 63 * 63 * (20 + 31)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_with_groups(groups: int, transposed: bool, dims: int) -> None:
    batch, channels, out, kernel, stride = 2, 6, 12, 3, 2
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    module = getattr(nn, name)(
        channels, out, kernel, stride=stride, padding=1, groups=groups, bias=True
    )
    x = torch.randn(batch, channels, *(9,) * dims, requires_grad=True)
    y = module(x)
    places = math.prod((x if transposed else y).shape[2:])
    once = 2 * batch * places * (channels * out // groups) * kernel**dims
    assert count_flops(lambda: module(x)).total == once
    assert count_flops(lambda: module(x).sum().backward()).total == 3 * once
    frozen = x.detach()
    assert count_flops(lambda: module(frozen).sum().backward()).total == 2 * once


def test_depthwise_backward_is_where_torch_is_wrong() -> None:
    module, x = nn.Conv1d(6, 6, 3, groups=6), torch.randn(2, 6, 9, requires_grad=True)
    call = lambda: module(x).sum().backward()  # noqa: E731
    assert count_flops(call).total == 3 * (2 * 2 * 6 * 7 * 3) < torch_count(call)


def test_fourier_transforms() -> None:
    x = torch.randn(3, 64)
    full = 5 * 3 * 64 * 6
    assert count_flops(lambda: torch.fft.rfft(x)).total == full // 2
    assert count_flops(lambda: torch.fft.fft(x.to(torch.complex64))).total == full
    assert count_flops(lambda: torch.fft.irfft(torch.fft.rfft(x), n=64)).total == full
    grid = torch.randn(2, 8, 16, dtype=torch.complex64)
    assert count_flops(lambda: torch.fft.fft2(grid)).total == 5 * 2 * 128 * 7
    assert count_flops(lambda: torch.fft.rfft(x[:, :1])).total == 0


def test_solves() -> None:
    n, k, batch = 12, 5, 3
    a = torch.eye(n).repeat(batch, 1, 1) * 4 + 0.1
    b = torch.randn(batch, n, k)
    lower = a.tril()
    for call, flops in [
        (lambda: torch.linalg.solve_triangular(lower, b, upper=False), n * n * k),
        (lambda: torch.linalg.cholesky(a), n**3 / 3),
        (lambda: torch.cholesky_solve(b, lower), 2 * n * n * k),
        (lambda: torch.linalg.lu_factor(a), 2 * n**3 / 3),
        (lambda: torch.linalg.solve(a, b), 2 * n**3 / 3 + 2 * n * n * k),
        (lambda: torch.linalg.inv(a), 2 * n**3),
        (lambda: torch.linalg.det(a), 2 * n**3 / 3),
    ]:
        assert count_flops(call).total == batch * flops


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_encoder_layer_counts_the_same_on_its_fast_path(norm_first: bool, masked: bool) -> None:
    b, n, c, wide, heads = 3, 17, 32, 64, 4
    layer = nn.TransformerEncoderLayer(
        c, heads, wide, batch_first=True, norm_first=norm_first, activation="gelu"
    ).eval()
    x = torch.randn(b, n, c)
    padding = torch.zeros(b, n, dtype=torch.bool) if masked else None
    names: set[str] = set()

    def run() -> None:
        with torch.no_grad():
            layer(x, src_key_padding_mask=padding)

    with FlopCounter() as counter:
        handle = counter.handle

        def note(func: Any, args: Any, kwargs: Any) -> Any:
            names.add(func._opname)
            return handle(func, args, kwargs)

        counter.handle = note  # type: ignore[method-assign]
        run()
    counter.check()
    assert "_transformer_encoder_layer_fwd" in names
    assert counter.total == 2 * b * n * c * (4 * c + 2 * wide) + 2 * b * n * n * c * 2
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert count_flops(run).total == counter.total
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_lstm_counts_as_its_cells_do() -> None:
    lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
    x = torch.randn(3, 17, 16)
    forward = 2 * 3 * 17 * 4 * 32 * ((16 + 32) + (32 + 32))
    assert count_flops(lambda: lstm(x)).total == forward
    x.requires_grad_()
    assert count_flops(lambda: lstm(x)[0].sum().backward()).total == 3 * forward


def test_inference_mode_and_vmap_count_the_same() -> None:
    x, weight = torch.randn(5, 63, 20), torch.randn(31, 20)

    def inference() -> None:
        with torch.inference_mode():
            F.linear(x, weight)
            torch.einsum("bnd,bmd->bnm", x, x)

    assert count_flops(inference).total == 2 * 5 * 63 * 20 * (31 + 63)
    mapped = count_flops(lambda: torch.vmap(lambda t: t @ weight.T)(x))
    assert mapped.total == 2 * 5 * 63 * 20 * 31


def test_meta_tensors_count_without_computing() -> None:
    x = torch.empty(10**6, 10**4, device="meta")
    assert count_flops(lambda: x @ x.T).total == 2 * 10**16


@torch.library.custom_op("manyheads_test_flops::twice", mutates_args=())
def twice(x: Tensor, w: Tensor) -> Tensor:
    return x @ w @ w


@torch.library.custom_op("manyheads_test_flops::twice_backward", mutates_args=())
def twice_backward(g: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return g @ w.T @ w.T, x.T @ g


def _twice_backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
    return twice_backward(g, *ctx.saved_tensors)


twice.register_autograd(
    _twice_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@torch.library.custom_op("manyheads_test_flops::native", mutates_args=())
def native(x: Tensor) -> Tensor:
    # As a kernel called through ctypes does: allocates in torch, computes elsewhere.
    out = torch.empty_like(x)
    out.numpy()[:] = x.numpy() @ x.numpy()
    return out


@torch.library.custom_op("manyheads_test_flops::native_known", mutates_args=())
def native_known(x: Tensor) -> Tensor:
    return native(x)


@torch.library.custom_op("manyheads_test_flops::torch_known", mutates_args=())
def torch_known(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() @ x.numpy())


@register_flop_formula(torch.ops.manyheads_test_flops.torch_known)
def _torch_known_flops(x_shape: Any, *, out_shape: Any = None) -> int:
    return 2 * x_shape[0] ** 3


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad @ x.T + x.T @ grad


def test_bodies_of_custom_ops_are_counted_forward_and_backward() -> None:
    x, w = leaves((7, 20), (20, 20))
    one = 2 * 7 * 20 * 20
    count = count_flops(gradients(twice, x, w))
    assert count.by_operator == {"aten::mm": 2 * one + 2 * one + one}
    (y,) = leaves((20, 20))
    assert count_flops(gradients(Product.apply, y)).total == 3 * 2 * 20**3


def test_a_body_that_leaves_torch_is_reported_until_it_has_a_formula() -> None:
    x = torch.randn(40, 40)
    with pytest.raises(UncountedError, match="manyheads_test_flops::native: give one"):
        count_flops(native, x)
    loose = count_flops(lambda: native(x * 2), strict=False)  # what computed before it is no proof
    assert (loose.total, loose.uncounted) == (0, {"manyheads_test_flops::native": 1600})
    register_flops("manyheads_test_flops::native_known", lambda x: 2 * x.shape[0] ** 3)
    known = count_flops(native_known, x)
    assert known.by_operator == {"manyheads_test_flops::native_known": 2 * 40**3}
    assert count_flops(torch_known, x).total == 2 * 40**3


def test_unknown_heavy_operators_are_named_and_small_ones_let_pass() -> None:
    big, small = torch.randn(40, 40), torch.randn(3, 3)
    with pytest.raises(UncountedError, match="aten::_linalg_svd"):
        count_flops(torch.linalg.svd, big)
    assert count_flops(torch.linalg.svd, small).total == 0
    with FlopCounter(ignore_below=1) as counter:
        torch.linalg.svd(small)
        sparse = big.to_sparse()
        torch.mm(sparse, big)  # the formula for dense products would be wrong
    assert set(counter.uncounted) >= {"aten::_linalg_svd", "aten::mm"}
    assert counter.total == 0


def test_light_operators_are_known_and_are_not_flops() -> None:
    x = torch.randn(8, 63, 20, requires_grad=True)
    layer = nn.Sequential(
        nn.LayerNorm(20), nn.RMSNorm(20), nn.SiLU(), nn.Softmax(-1), nn.Dropout(0.1), nn.GLU()
    )
    index = torch.randint(0, 63, (8, 40, 10))
    embedding = nn.Embedding(70, 10)

    def run() -> None:
        y = layer(x)
        y = y.cumsum(1).gather(1, index).sort(1)[0].logsumexp(1) + y.amax(1)
        y = y + embedding(index[:, 0]).sum(1) + y.topk(3)[0].std(-1, keepdim=True)
        y = F.pad(y[:, None].repeat(1, 30, 1), (1, 1)).roll(1, 0).tril()
        y = F.interpolate(y, scale_factor=2.0, mode="linear") * torch.rand(60, 1).sigmoid()[:30]
        y = torch.where(y > 0, y, y.exp()).masked_fill(y.isnan(), 0.0)
        y = torch.zeros_like(y).scatter_add(1, torch.zeros(8, 30, 24, dtype=torch.long), y)
        y.clamp_(max=5).le_(3.0)
        F.cross_entropy(y.flatten(0, 1), torch.zeros(240, dtype=torch.long)).backward()

    count = count_flops(run)
    assert count.total == 0
    assert count.elementwise > x.numel()


def test_optimizer_steps_are_light() -> None:
    model = nn.Linear(63, 40)
    optimizers = [
        torch.optim.AdamW(model.parameters(), foreach=False),
        torch.optim.AdamW(model.parameters(), foreach=True),
        torch.optim.AdamW(model.parameters(), fused=True),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ]
    model(torch.randn(5, 63)).sum().backward()

    def run() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

    assert count_flops(run).total == 0


def test_distances_by_products_are_seen() -> None:
    x, y = torch.randn(63, 20), torch.randn(40, 20)
    count = count_flops(lambda: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"))
    assert count.total == 2 * 63 * 40 * (20 + 2)  # norms ride along as two more columns


def test_counter_accumulates_and_can_be_read_inside() -> None:
    x = torch.randn(8, 8)
    with FlopCounter() as counter:
        x @ x
        assert counter.total == 2 * 8**3
        x @ x
    x @ x
    assert counter.total == 4 * 8**3


def test_registering_names() -> None:
    with pytest.raises(ValueError, match="has no namespace"):
        register_flops("mm", lambda *a: 0)
    with pytest.raises(ValueError, match="has a FLOP formula already"):
        register_flops("aten::mm", lambda *a: 0)
    register_flops("manyheads_test_flops::never_called", lambda: 1)
    with pytest.raises(ValueError, match="has a FLOP formula already"):
        register_flops("manyheads_test_flops::never_called", lambda: 2)


def test_formulas_belong_to_operators_that_exist() -> None:
    get_mechanism("mamba")  # brings its operators
    for name in [*FORMULAS, *TRANSPARENT]:
        space, _, operator = name.rpartition("::")
        assert hasattr(getattr(torch.ops, space or "aten"), operator), name
