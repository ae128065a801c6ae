"""Executing a plan: all segments at once over threads, then the merge of each output tile.

B batch, H heads, G = H / H_kv query heads a key-value head, L query tokens, J heads computed by
one product, R its rows (G x query tokens of a block), M keys, D head dim, V value dim.

Two phases, so that no worker ever waits for another: hosts that wait inside the first would hold
threads that the awaited need. Scores exist for a few thousand keys at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from manyheads.attention.lean.merge import Partial, empty_partial, merge_partials
from manyheads.attention.lean.native import Pages, run_native
from manyheads.attention.lean.plan import Order, Plan, Run, Segment, plan
from manyheads.attention.lean.schedule import ceil_div

__all__ = ["Reader", "padded_reader", "run_plan", "run_segments"]

# (request, heads, keys) to the keys (J, M, D) and values (J, M, V)
Reader = Callable[[int, slice, slice], tuple[Tensor, Tensor]]
T = TypeVar("T")

_LEAST_TILES = 16  # a worker: less work is not worth another thread
_SCORES = 1 << 15  # scores alive at once in each thread: 128 KiB


def padded_reader(key: Tensor, value: Tensor) -> Reader:
    """Read caches (B, H_kv, N, D) and (B, H_kv, N, V)."""

    def read(request: int, heads: slice, keys: slice) -> tuple[Tensor, Tensor]:
        return key[request, heads, keys], value[request, heads, keys]

    return read


def settle(
    dealt: Plan | None,
    sizes: Sequence[int],
    *,
    heads: int,
    queries: int,
    is_causal: bool,
    workers: int | None,
    tile: int,
    order: Order,
) -> Plan:
    """Return the plan that was given, if it fits, or make one.

    Raises:
        ValueError: the plan is for other heads, queries or lengths.
    """
    if dealt is not None:
        if (dealt.heads, dealt.queries) != (heads, queries) or dealt.is_causal != is_causal:
            raise ValueError(
                f"the plan is for {dealt.heads} key-value heads and {dealt.queries} queries, "
                f"is_causal={dealt.is_causal}; here are {heads}, {queries}, {is_causal}"
            )
        if not dealt.fits(sizes):
            raise ValueError(f"the plan is for other lengths than {list(sizes)}: make a new one")
        return dealt
    if workers is None:
        workers = default_workers(sizes, heads=heads, tile=tile)
    return plan(
        sizes, heads=heads, workers=workers, tile=tile, order=order, queries=queries,
        is_causal=is_causal,
    )  # fmt: skip


def default_workers(sizes: Sequence[int], *, heads: int, tile: int) -> int:
    """Return torch's threads, or fewer where a worker would get too little to be worth it."""
    tiles = heads * sum(ceil_div(n, tile) for n in sizes)
    return max(1, min(torch.get_num_threads(), tiles // _LEAST_TILES))


def run_plan(
    query: Tensor,
    read: Reader,
    lengths: Sequence[int],
    dealt: Plan,
    *,
    scale: float,
    dim: int,
    pages: Pages | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as planned.

    Args:
        query: (B, H, L, D), float32 or float64.
        read: gives keys and values, in any floating-point dtype.
        lengths: keys of each request; the plan fits them.
        dealt: the plan.
        scale: factor on the scores.
        dim: V.
        pages: where the caches lie: the compiled kernel reads them there, instead of ``read``.

    Returns:
        (B, H, L, V) and the logarithms of the sums (B, H, L), in the dtype of ``query``.
    """
    if pages is not None:
        return run_native(query, pages, lengths, dealt, scale=scale)
    batch, heads, length, _ = query.shape
    group = heads // dealt.heads
    parts = _run(query, read, lengths, dealt, scale=scale, dim=dim, fused=True)
    out = query.new_zeros(batch, dealt.heads, group, length, dim)
    lse = query.new_full((batch, dealt.heads, group, length), -torch.inf)
    # One merge of all that have equally many rows: an output tile is (request, head) in a block.
    for block in range(-(-length // dealt.query_tile)):
        found = [(r, p) for r, p in parts if r.segment.block == block]
        if not found:
            continue
        ids = [
            r.segment.request * dealt.heads + r.segment.head + i
            for r, _ in found
            for i in range(r.heads)
        ]
        whole = merge_partials(
            Partial(*(torch.cat(t) for t in zip(*(p for _, p in found), strict=True))),
            torch.tensor(ids, device=query.device),
            count=batch * dealt.heads,
        )
        rows = slice(block * dealt.query_tile, (block + 1) * dealt.query_tile)
        shape = (batch, dealt.heads, group, -1)
        out[:, :, :, rows] = whole.out.view(*shape, dim)
        lse[:, :, :, rows] = whole.lse.view(shape)
    return out.flatten(1, 2), lse.flatten(1, 2)


def run_segments(
    query: Tensor, read: Reader, lengths: Sequence[int], dealt: Plan, *, scale: float, dim: int
) -> list[Partial]:
    """Return the partial result of every segment of the plan: (R) and (R, V)."""
    parts = _run(query, read, lengths, dealt, scale=scale, dim=dim, fused=False)
    return [Partial(*tensors) for _, p in parts for tensors in zip(*p, strict=True)]


def _run(
    query: Tensor,
    read: Reader,
    lengths: Sequence[int],
    dealt: Plan,
    *,
    scale: float,
    dim: int,
    fused: bool,
) -> list[tuple[Run, Partial]]:
    """Return the partial results of all runs, (J, R) and (J, R, V), in the order of the line.

    ``fused``: torch's kernel may compute them, which gives m + log(l), 1 and o / l: the same to
    a merge, but not the numbers that the paper names.
    """
    group = query.shape[1] // dealt.heads
    stacked = (query * scale).unflatten(1, (dealt.heads, group))  # (B, H_kv, G, L, D)
    fused = fused and query.device.type == "cpu" and not dealt.is_causal and dim == query.shape[-1]

    def work(todo: Sequence[Run]) -> list[tuple[Run, Partial]]:
        done = []
        for run in todo:
            s = run.segment
            heads = slice(s.head, s.head + run.heads)
            rows = slice(s.block * dealt.query_tile, (s.block + 1) * dealt.query_tile)
            q = stacked[s.request, heads, :, rows].flatten(1, 2)  # (J, R, D)
            length = lengths[s.request]
            compute = _one_call if fused else _products
            done.append((run, compute(q, read, heads, s, length, dealt, dim)))
        return done

    results = parallel(work, dealt.runs, device=query.device)
    return [pair for done in results for pair in done]


def _one_call(
    q: Tensor, read: Reader, heads: slice, s: Segment, length: int, dealt: Plan, dim: int
) -> Partial:
    """Attend to the keys of a run by one call of torch's kernel, which keeps no scores."""
    keys = slice(s.first * dealt.tile, min(s.end * dealt.tile, length))
    key, value = read(s.request, heads, keys)
    if key.dtype != q.dtype:  # the kernel would round its result to the dtype of the caches
        return _products(q, read, heads, s, length, dealt, dim)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q[None], key[None], value[None], scale=1.0
    )
    return Partial(lse[0], torch.ones_like(lse[0]), out[0])


def _products(
    q: Tensor, read: Reader, heads: slice, s: Segment, length: int, dealt: Plan, dim: int
) -> Partial:
    """Attend to the keys of a run, a few tiles at a time, by the online softmax."""
    limits = None
    if dealt.is_causal:
        queries = min((s.block + 1) * dealt.query_tile, dealt.queries) - s.block * dealt.query_tile
        limits = causal_limits(dealt, s, length, q.shape[1] // queries, q.device)
    m, sums, o = empty_partial(*q.shape[:2], dim=dim, like=q)
    m, sums = m[..., None], sums[..., None]
    for a, b in spans(dealt, s, length, q.shape[0] * q.shape[1]):
        key, value = (t.to(q.dtype) for t in read(s.request, heads, slice(a, b)))
        scores = q @ key.mT  # (J, R, M)
        if limits is not None:
            hide(scores, limits, a, b)
        best = torch.maximum(m, scores.amax(-1, keepdim=True))
        base = best if limits is None else best.masked_fill(best == -torch.inf, 0)
        weights = scores.sub_(base).exp_()
        decay = (m - base).exp_()
        sums = sums.mul_(decay).add_(weights.sum(-1, keepdim=True))
        o = torch.baddbmm(o.mul_(decay), weights, value)
        m = best
    return Partial(m[..., 0], sums[..., 0], o)


def spans(dealt: Plan, s: Segment, length: int, rows: int) -> Iterator[tuple[int, int]]:
    """Yield first and last key (exclusive) of the products that a segment is computed by."""
    step = max(1, _SCORES // (rows * dealt.tile)) * dealt.tile
    end = min(s.end * dealt.tile, length)
    for a in range(s.first * dealt.tile, end, step):
        yield a, min(a + step, end)


def causal_limits(dealt: Plan, s: Segment, length: int, group: int, device: torch.device) -> Tensor:
    """Return the place of the last key that each row may see: (R, 1)."""
    first = s.block * dealt.query_tile
    end = min(first + dealt.query_tile, dealt.queries)
    places = torch.arange(first, end, device=device) + (length - dealt.queries)
    return places.repeat(group)[:, None]


def hide(scores: Tensor, limits: Tensor, a: int, b: int) -> None:
    """Put -inf where keys ``a`` to ``b`` are later than a row may see."""
    places = torch.arange(a, b, device=scores.device)
    scores.masked_fill_(places > limits, -torch.inf)


def parallel(
    work: Callable[[Sequence[Run]], T], loads: Sequence[Sequence[Run]], *, device: torch.device
) -> list[T]:
    """Call ``work`` on each load, over as many threads as torch may use, each of them single.

    A dispatch mode (a counter of FLOPs) belongs to its thread, and another device has streams of
    its own: then one after another.
    """
    threads = min(torch.get_num_threads(), len(loads))
    if threads < 2 or device.type != "cpu" or is_in_torch_dispatch_mode():
        return [work(load) for load in loads]
    return list(_pool(threads).map(partial(_without_gradient, work), loads))


def _without_gradient(work: Callable[[Sequence[Run]], T], load: Sequence[Run]) -> T:
    with torch.no_grad():  # whether gradients are recorded is a fact of each thread
        return work(load)


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Start threads that use one core each; the calling thread keeps its number."""
    before = torch.get_num_threads()
    started = threading.Barrier(threads)

    def begin() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "manyheads-lean", initializer=begin)
    # Threads are started by tasks that find none idle: all wait in the barrier for the last.
    for task in [pool.submit(int) for _ in range(threads)]:
        task.result()
    # The number is each thread's own, but a thread made later begins with the one set last.
    torch.set_num_threads(before)
    return pool
