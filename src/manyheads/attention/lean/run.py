"""Executing a plan: all segments at once over threads, then the merge of each output tile.

B batch, H heads, G = H / H_kv query heads a key-value head, L query tokens, R rows of a product
(G x query tokens of a block), D head dim, V value dim.

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
from manyheads.attention.lean.plan import Plan, Segment

__all__ = ["Reader", "padded_reader", "run_plan", "run_segments"]

# (request, head, first key, end) to the keys (M, D) and values (M, V)
Reader = Callable[[int, int, int, int], tuple[Tensor, Tensor]]
T = TypeVar("T")

_SCORES = 1 << 15  # scores alive at once in each thread: 128 KiB


def padded_reader(key: Tensor, value: Tensor) -> Reader:
    """Read caches (B, H_kv, N, D) and (B, H_kv, N, V)."""

    def read(request: int, head: int, a: int, b: int) -> tuple[Tensor, Tensor]:
        return key[request, head, a:b], value[request, head, a:b]

    return read


def run_plan(
    query: Tensor, read: Reader, lengths: Sequence[int], dealt: Plan, *, scale: float, dim: int
) -> tuple[Tensor, Tensor]:
    """Attend as planned.

    Args:
        query: (B, H, L, D), float32 or float64.
        read: gives keys and values, in any floating-point dtype.
        lengths: keys of each request; the plan fits them.
        dealt: the plan.
        scale: factor on the scores.
        dim: V.

    Returns:
        (B, H, L, V) and the logarithms of the sums (B, H, L), in the dtype of ``query``.
    """
    batch, heads, length, _ = query.shape
    group = heads // dealt.heads
    out = query.new_zeros(batch, dealt.heads, group, length, dim)
    lse = query.new_full((batch, dealt.heads, group, length), -torch.inf)
    parts = run_segments(query, read, lengths, dealt, scale=scale, dim=dim)
    waiting: list[Partial] = []
    for s, part in zip(dealt.segments, parts, strict=True):
        waiting.append(part)
        if not s.finishing:
            continue
        whole = waiting[0] if len(waiting) == 1 else merge_partials(_stack(waiting))
        waiting = []
        rows = slice(s.block * dealt.query_tile, (s.block + 1) * dealt.query_tile)
        out[s.request, s.head, :, rows] = whole.out.unflatten(0, (group, -1))
        lse[s.request, s.head, :, rows] = whole.lse.unflatten(0, (group, -1))
    return out.flatten(1, 2), lse.flatten(1, 2)


def run_segments(
    query: Tensor, read: Reader, lengths: Sequence[int], dealt: Plan, *, scale: float, dim: int
) -> list[Partial]:
    """Return the partial result of every segment of the plan: (R) and (R, V)."""
    group = query.shape[1] // dealt.heads
    stacked = (query * scale).unflatten(1, (dealt.heads, group))  # (B, H_kv, G, L, D)

    def work(places: list[int]) -> list[Partial]:
        return [
            _segment(stacked, read, lengths[dealt.segments[i].request], dealt, i, dim)
            for i in places
        ]

    done = parallel(work, dealt.by_worker(), device=query.device)
    return [part for parts in done for part in parts]


def _segment(
    stacked: Tensor, read: Reader, length: int, dealt: Plan, index: int, dim: int
) -> Partial:
    """Attend to the keys of one segment, a few tiles at a time, by the online softmax."""
    s = dealt.segments[index]
    block = stacked[s.request, s.head, :, s.block * dealt.query_tile :][:, : dealt.query_tile]
    q = block.flatten(0, 1)  # (R, D)
    limits = causal_limits(dealt, s, length, block.shape[0], q.device) if dealt.is_causal else None
    m, sums, o = empty_partial(len(q), dim=dim, like=q)
    m, sums = m[:, None], sums[:, None]
    for a, b in spans(dealt, s, length, len(q)):
        key, value = (t.to(q.dtype) for t in read(s.request, s.head, a, b))
        scores = q @ key.mT  # (R, M)
        if limits is not None:
            hide(scores, limits, a, b)
        best = torch.maximum(m, scores.amax(-1, keepdim=True))
        base = best if limits is None else best.masked_fill(best == -torch.inf, 0)
        weights = scores.sub_(base).exp_()
        decay = (m - base).exp_()
        sums = sums.mul_(decay).add_(weights.sum(-1, keepdim=True))
        o = torch.addmm(o.mul_(decay), weights, value)
        m = best
    return Partial(m[:, 0], sums[:, 0], o)


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


def _stack(parts: Sequence[Partial]) -> Partial:
    m, sums, o = zip(*parts, strict=True)
    return Partial(torch.stack(m), torch.stack(sums), torch.stack(o))


def parallel(
    work: Callable[[list[int]], T], loads: Sequence[list[int]], *, device: torch.device
) -> list[T]:
    """Call ``work`` on each load, over as many threads as torch may use, each of them single.

    A dispatch mode (a counter of FLOPs) belongs to its thread, and another device has its own
    streams: then one after another.
    """
    threads = min(torch.get_num_threads(), len(loads))
    if threads < 2 or device.type != "cpu" or is_in_torch_dispatch_mode():
        return [work(load) for load in loads]
    return list(_pool(threads).map(partial(_without_gradient, work), loads))


def _without_gradient(work: Callable[[list[int]], T], load: list[int]) -> T:
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
