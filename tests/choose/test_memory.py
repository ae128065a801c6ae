"""Memory figures against hand-computed sequences, against each other, and inside operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import checkpoint

from manyheads.choose.allocations import record_allocations
from manyheads.choose.memory import largest_tensor_numel, peak_memory, track_memory

torch.set_num_threads(1)

SCRATCH = 100_003  # elements of the large temporaries; nothing else here comes near


@torch.library.custom_op("manyheads_test_memory::greedy", mutates_args=())
def greedy(x: Tensor) -> Tensor:
    scratch = torch.empty(SCRATCH)
    scratch.fill_(1.0)
    return x + scratch[0]


@torch.library.custom_op("manyheads_test_memory::greedy_backward", mutates_args=())
def greedy_backward(grad: Tensor) -> Tensor:
    scratch = torch.zeros(2 * SCRATCH)
    return grad * (1 + scratch.sum())


greedy.register_autograd(lambda ctx, grad: greedy_backward(grad))

_LIBRARY = torch.library.Library("manyheads_test_memory_lib", "FRAGMENT")
_LIBRARY.define("greedy(Tensor x) -> Tensor")
_LIBRARY.impl("greedy", lambda x: x + torch.ones(SCRATCH)[:1], "CPU")

CACHE = torch.ones(SCRATCH)


@torch.library.custom_op("manyheads_test_memory::cached", mutates_args=())
def cached(x: Tensor) -> Tensor:
    return x + CACHE[:1]


class Greedy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + torch.ones(SCRATCH)[:1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.ones(3 * SCRATCH)[:1]


class Model:
    """The same steps on tensors and in arithmetic: bytes now, at most, and of the largest."""

    def __init__(self) -> None:
        self.slots: list[tuple[Tensor, int]] = []  # a tensor and the number of its storage
        self.size: dict[int, int] = {}
        self.peak = self.largest = self.made = 0

    @property
    def current(self) -> int:
        return sum(self.size.values())

    def new(self, size: int) -> None:
        self._add(torch.empty(size, dtype=torch.uint8), size)

    def twice(self, place: int) -> None:
        if self.slots:
            tensor, _ = self.slots[place % len(self.slots)]
            self._add(torch.cat([tensor, tensor]), 2 * tensor.numel())

    def view(self, place: int) -> None:
        if self.slots:
            tensor, key = self.slots[place % len(self.slots)]
            self.slots.append((tensor[: tensor.numel() // 2], key))

    def fill(self, place: int) -> None:
        if self.slots:
            self.slots[place % len(self.slots)][0].fill_(1)

    def drop(self, place: int) -> None:
        if self.slots:
            _, key = self.slots.pop(place % len(self.slots))
            if all(k != key for _, k in self.slots):
                del self.size[key]

    def grow(self, place: int, size: int) -> None:
        if not self.slots:
            return
        tensor, key = self.slots[place % len(self.slots)]
        tensor.resize_(size)
        if size > self.size[key]:
            # Both blocks exist while the numbers are copied.
            self.peak = max(self.peak, self.current + size)
            self.size[key] = size
            self.largest = max(self.largest, size)

    def _add(self, tensor: Tensor, size: int) -> None:
        self.made += 1
        self.slots.append((tensor, self.made))
        self.size[self.made] = size
        self.peak = max(self.peak, self.current)
        self.largest = max(self.largest, size)


PLACES = st.integers(0, 50)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("new"), st.integers(0, 500)),
        st.tuples(st.just("view"), PLACES),
        st.tuples(st.just("twice"), PLACES),
        st.tuples(st.just("fill"), PLACES),
        st.tuples(st.just("drop"), PLACES),
        st.tuples(st.just("grow"), PLACES, st.integers(0, 900)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_tracker_equals_arithmetic_on_random_steps(steps: list[Any]) -> None:
    with track_memory() as tracker:
        model = Model()
        for name, *arguments in steps:
            getattr(model, name)(*arguments)
            assert tracker.current == model.current, name
        model.slots.clear()
        assert tracker.current == 0
    assert tracker.peak == model.peak
    assert tracker.largest == model.largest


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_allocator_equals_arithmetic_on_random_steps(steps: list[Any]) -> None:
    with record_allocations() as record:
        model = Model()
        for name, *arguments in steps:
            getattr(model, name)(*arguments)
    assert record.peak == model.peak
    assert record.current == model.current
    assert record.largest == model.largest


def test_example_by_hand() -> None:
    with track_memory() as tracker:
        a = torch.ones(1000)  # 4000
        b = a.exp()  # 8000
        del a  # 4000
        view = b.view(10, 100)[3:]
        del b
        assert tracker.current == 4000
        c = view + view  # 4000 + 2800
        del view
        assert (tracker.current, tracker.peak) == (2800, 8000)
        del c
    assert (tracker.current, tracker.peak, tracker.largest) == (0, 8000, 4000)
    assert (tracker.largest_numel, tracker.largest_shape) == (1000, (1000,))
    assert not tracker.untracked


def test_what_existed_at_entry_does_not_count() -> None:
    x = torch.ones(5000)
    with track_memory() as tracker:
        x.mul_(2)
        y = x[::2]
        z = y + 1  # 2500 new floats
        del x, y
        assert tracker.current == 10_000
    del z
    assert (tracker.peak, tracker.current) == (10_000, 10_000)


def test_growth_of_what_existed_counts_the_difference() -> None:
    x = torch.empty(100, dtype=torch.uint8)
    with track_memory() as tracker:
        x.resize_(250)
    assert tracker.current == 150
    assert tracker.peak == 250  # the new block, while the old one is still there


def test_out_argument_is_followed() -> None:
    a, out = torch.ones(30, 30), torch.empty(0)
    with track_memory() as tracker:
        torch.mm(a, a, out=out)
    assert (tracker.current, tracker.peak) == (3600, 3600)
    rows = [torch.empty(0) for _ in range(30)]
    with track_memory() as tracker:
        torch.unbind_copy(a, out=rows)  # returns nothing itself
    assert tracker.current == 3600


def test_tensor_from_a_list_counts() -> None:
    with track_memory() as tracker:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert tracker.current == 12
        del x
        assert tracker.current == 0


def test_sparse_tensors_count_their_parts() -> None:
    dense = torch.eye(40)
    with track_memory() as tracker:
        sparse = dense.to_sparse()
        held = tracker.current
    assert held == 40 * 2 * 8 + 40 * 4
    assert sparse.is_sparse


def test_saved_tensors_live_until_backward_has_used_them() -> None:
    x = torch.randn(1000, requires_grad=True)
    with track_memory() as tracker:
        y = (x * 2).exp()  # x*2 dies, exp saves its own output
        held_by_name = tracker.current
        loss = y.sum()
        del y
        assert tracker.current == held_by_name + 4  # autograd still holds y
        loss.backward()
        assert tracker.current == 4 + 4000  # the loss and the gradient
    assert held_by_name == 4000


def run_backward(fn: Callable[..., Tensor]) -> Callable[[], None]:
    x = torch.randn(7, requires_grad=True)

    def call() -> None:
        torch.autograd.grad(fn(x).sum(), x)

    return call


@pytest.mark.parametrize(
    ("fn", "scratch"),
    [
        (greedy, 2 * SCRATCH),
        (torch.ops.manyheads_test_memory_lib.greedy, SCRATCH),
        (Greedy.apply, 3 * SCRATCH),
    ],
    ids=["custom_op", "library", "autograd.Function"],
)
def test_bodies_are_seen_forward_and_backward(fn: Any, scratch: int) -> None:
    if fn is torch.ops.manyheads_test_memory_lib.greedy:
        x = torch.randn(7)
        call: Callable[[], Any] = lambda: fn(x)  # noqa: E731
    else:
        call = run_backward(fn)
    assert largest_tensor_numel(call) == scratch
    for method in ("allocator", "dispatch"):
        memory = peak_memory(call, method=method)  # type: ignore[arg-type]
        assert memory.largest_tensor_bytes == 4 * scratch
        assert 4 * scratch < memory.peak_bytes < 4 * scratch + 2000
        assert memory.method == method


def test_forward_body_alone_is_seen() -> None:
    x = torch.randn(7)
    with track_memory() as tracker:
        y = greedy(x)
    assert tracker.largest_numel == SCRATCH
    assert tracker.largest_operator == "manyheads_test_memory::greedy > aten::empty"
    assert tracker.current == y.numel() * 4


def test_tensors_kept_outside_a_body_do_not_count() -> None:
    with track_memory() as tracker:
        cached(torch.zeros(3))
    assert tracker.largest_numel == 3


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_quadratic_tensors_are_found_and_fused_attention_has_none(
    is_causal: bool, grad: bool
) -> None:
    b, h, n, d = 1, 3, 257, 20
    qkv = [torch.randn(b, h, n, d, requires_grad=grad) for _ in range(3)]

    def run(fn: Callable[..., Tensor]) -> None:
        out = fn(*qkv)
        if grad:
            torch.autograd.grad(out.sum(), qkv)

    assert largest_tensor_numel(run, attention) == b * h * n * n
    fused = lambda *t: F.scaled_dot_product_attention(*t, is_causal=is_causal)  # noqa: E731
    assert largest_tensor_numel(run, fused) < b * h * n * n / 2
    with track_memory() as tracker:
        mask = torch.ones(b, h, n, n, dtype=torch.bool)
    assert tracker.largest_numel == mask.numel()


def cases() -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    x = torch.randn(64, 63, requires_grad=True)
    qkv = [torch.randn(2, 3, 63, 20, requires_grad=True) for _ in range(3)]
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    fast = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    tokens = torch.randn(3, 17, 32)
    gru = nn.GRU(32, 16, batch_first=True)
    conj = torch.randn(30, 30, dtype=torch.complex64).conj()

    def grad(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(fn(*inputs).sum(), inputs)

    def sdpa(*t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*t, is_causal=True)

    def strided(*t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(s.transpose(1, 2) for s in t))

    def again(t: Tensor) -> Tensor:
        # The state of the random generator, which it would save, is made by no operator.
        return checkpoint(
            lambda u: (u @ u.T).softmax(-1) @ u, t, use_reentrant=False, preserve_rng_state=False
        )

    def encoder(module: nn.Module) -> Callable[[], Any]:
        parameters = list(module.parameters())
        return lambda: torch.autograd.grad(module(tokens).sum(), parameters)

    def recurrent() -> Any:
        return torch.autograd.grad(gru(tokens)[0].sum(), list(gru.parameters()))

    def no_grad() -> Any:
        with torch.no_grad():
            return fast(tokens)

    def inference() -> Any:
        with torch.inference_mode():
            return fast.linear1(tokens)

    return {
        "softmax": grad(attention, *qkv),
        "sdpa": grad(sdpa, *qkv),
        "sdpa_strided": grad(strided, *qkv),
        "einsum": grad(lambda a, b: torch.einsum("bhnd,bhne->bhde", a, b), *qkv[:2]),
        "layer_norm": grad(lambda t: F.layer_norm(t, (63,)), x),
        "rms_norm": grad(lambda t: F.rms_norm(t, (63,)), x),
        "cumsum": grad(lambda t: t.cumsum(0), x),
        "logsumexp": grad(lambda t: t.logsumexp(-1), x),
        "where": grad(lambda t: torch.where(t > 0, t, t.exp()), x),
        "stack": grad(lambda t: torch.stack([t, t.exp()]), x),
        "fft": grad(lambda t: torch.fft.irfft(torch.fft.rfft(t, n=128), n=128), x),
        "solve": grad(
            lambda t: torch.linalg.solve_triangular(
                torch.eye(63).add(t[:63].tril(-1)), t[:63], upper=False
            ),
            x,
        ),
        "checkpoint": grad(again, x),
        "conj": lambda: conj @ conj,
        "train": encoder(layer),
        "gru": recurrent,
        "fast_path": no_grad,
        "inference_mode": inference,
        "vmap": lambda: torch.vmap(lambda t: t.exp().sum())(x.detach()),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_dispatch_agrees_with_the_allocator(name: str) -> None:
    call = cases()[name]
    call()  # what torch makes once and keeps
    exact = peak_memory(call, method="allocator")
    followed = peak_memory(call, method="dispatch")
    assert exact.peak_bytes > 0
    # A product with a Python number makes scalars of a few bytes that the mode is not shown.
    assert abs(exact.peak_bytes - followed.peak_bytes) <= 64
    assert abs(exact.retained_bytes - followed.retained_bytes) <= 64


def test_dispatch_never_reads_low_where_backward_changes_under_a_mode() -> None:
    x, index = torch.randn(64, 63, requires_grad=True), torch.randint(0, 63, (64, 9))

    def call() -> Any:
        return torch.autograd.grad(x.gather(1, index).sum(), x)

    exact, followed = (peak_memory(call, method=m) for m in ("allocator", "dispatch"))
    assert exact.peak_bytes < followed.peak_bytes < 2 * exact.peak_bytes + 1000


def test_retained_bytes_are_result_and_saved_tensors() -> None:
    x = torch.randn(1000, requires_grad=True)
    memory = peak_memory(lambda: x.exp().sin())
    # exp saves its output, which is what sin saves as its input.
    assert memory.retained_bytes == 4000 + 4000
    assert memory.peak_bytes >= memory.retained_bytes
    assert peak_memory(lambda: None).peak_bytes == 0


def test_repeated_measurement_does_not_depend_on_what_was_recorded_before() -> None:
    layer = nn.Linear(50, 60)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 50)

    def step() -> None:
        optimizer.zero_grad()  # releases gradients, which the last recording has seen, or not
        layer(x).square().mean().backward()
        optimizer.step()

    step()
    peaks = {peak_memory(step).peak_bytes for _ in range(3)}
    assert len(peaks) == 1


def test_meta_tensors_predict_without_allocating() -> None:
    real = [torch.randn(1, 2, 63, 20) for _ in range(3)]
    meta = [t.to("meta") for t in real]
    assert (
        peak_memory(attention, *meta, method="dispatch").peak_bytes
        == peak_memory(attention, *real, method="allocator").peak_bytes
    )
    huge = torch.empty(1, 1, 10**6, 64, device="meta")
    assert peak_memory(attention, huge, huge, huge, method="dispatch").peak_bytes > 4 * 10**12


def test_nested_trackers_each_have_their_own_entry() -> None:
    with track_memory() as outer:
        a = torch.ones(100)
        with track_memory() as inner:
            b = torch.ones(50)
        c = a[:50] + b
    assert (inner.peak, inner.current) == (200, 200)
    assert (outer.peak, outer.current) == (800, 800)
    assert c.numel() == 50


def test_tracker_stands_still_after_an_exception_and_the_block() -> None:
    seen: list[Any] = []

    def fail() -> None:
        with track_memory() as tracker:
            seen.extend([tracker, torch.ones(100)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    tracker = seen[0]
    seen.clear()
    torch.ones(10_000)
    assert (tracker.peak, tracker.current) == (400, 400)


def test_higher_order_operators_are_refused() -> None:
    class Opaque(HigherOrderOperator):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)

    opaque = Opaque("manyheads_test_opaque")
    with torch.inference_mode():  # no autograd kernel is needed
        x = torch.ones(3)
        with pytest.raises(RuntimeError, match="higher-order operator"), track_memory():
            opaque(x)


def test_bad_methods_and_nested_recording_are_named() -> None:
    with pytest.raises(ValueError, match="'sampling' is not one of"):
        peak_memory(lambda: None, method="sampling")  # type: ignore[arg-type]
    with (
        record_allocations(),
        pytest.raises(RuntimeError, match="another profiler"),
    ):
        peak_memory(lambda: None)
    assert peak_memory(torch.ones, 10).peak_bytes == 40
