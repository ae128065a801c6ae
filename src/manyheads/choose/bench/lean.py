"""A token of lean attention against torch's own attention, and against the memory's pace.

The query heads of one key-value head share what they read. Torch's own reads it once for each of
them if it is told of the groups, and once for all if it is given them as rows: both stand beside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.lean.op import lean
from manyheads.choose.machine import available_memory
from manyheads.choose.predict import can_hold
from manyheads.choose.table import text_table
from manyheads.choose.timing import forward, interleaved
from manyheads.choose.units import show_seconds
from manyheads.native import library

__all__ = ["LEAN_LENGTHS", "lean_against_sdpa", "lean_case", "lean_text", "memory_reader"]

LEAN_LENGTHS = (4096, 16_384, 65_536, 262_144)
_QUICK = (512, 1024)
_HEADS = ((8, 1), (32, 8))
_DIM = 128
_LONG = 65_536  # from here on nothing of a cache is found in a processor's own
_MOST = 2_200_000_000  # bytes of keys and values


def lean_against_sdpa(*, quick: bool, seed: int) -> dict[str, Any]:
    """Time one token at contexts of 4k to 256k: one request, and four of different lengths.

    Heads are 8 on 1 and 32 on 8, of 128. A ragged batch is (N, N/4, N/16, N/64), padded and
    masked for torch's own. Without float32 kernels the forms in PyTorch are what is measured.
    """
    lengths = _QUICK if quick else LEAN_LENGTHS
    wanted = [
        (h, kv, n, ragged) for n in lengths for h, kv in _HEADS for ragged in (False, True)
        if _bytes(kv, n, ragged) <= _MOST
    ]  # fmt: skip
    wanted = [w for w in wanted if can_hold(_bytes(*w[1:]), available_memory())]
    store = _store(max(_bytes(*w[1:]) for w in wanted) // 4, seed)
    rows = [
        lean_case(store, heads=h, kv_heads=kv, length=n, ragged=ragged, quick=quick)
        for h, kv, n, ragged in wanted
    ]
    found: dict[str, Any] = {
        "lengths": list(lengths),
        "head_dim": _DIM,
        "kernel": library("lean") is not None,
        "rows": rows,
        "over_sdpa": _mean(rows, "over_sdpa"),
        "over_stacked": _mean(rows, "over_stacked"),
    }
    if long := [r for r in rows if r["length"] >= _LONG]:
        found["least_bandwidth_share"] = min(r["bandwidth_share"] for r in long)
    if two := [r for r in rows if "threads_over_one" in r and r["length"] >= _LONG]:
        for figure in ("threads_over_one", "read_threads_over_one"):
            found[figure] = _mean(two, figure)
    return found


def lean_case(
    store: Tensor, *, heads: int, kv_heads: int, length: int, ragged: bool, quick: bool = False
) -> dict[str, Any]:
    """Time one shape, its keys and values the first numbers of ``store``.

    Times of all threads and, for one key-value head and request, of one. ``read`` is a loop that
    adds up as many numbers as the contexts have.
    """
    sizes = [max(1, length // 4**i) for i in range(4 if ragged else 1)]
    shape = len(sizes), kv_heads, length, _DIM
    count = len(sizes) * kv_heads * length * _DIM
    key, value = (store[i * count : (i + 1) * count].view(shape) for i in range(2))
    query = torch.randn(len(sizes), heads, 1, _DIM, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor(sizes) if ragged else None
    mask = None if lengths is None else (torch.arange(length) < lengths[:, None])[:, None, None]
    used = 2 * sum(sizes) * kv_heads * _DIM
    threads = torch.get_num_threads()
    attend = F.scaled_dot_product_attention
    calls: dict[str, Callable[[], Any]] = {
        "lean": forward(lean, query, key, value, lengths=lengths),
        "read": memory_reader(store[:used], threads),
        "stacked": forward(
            attend, query.view(len(sizes), kv_heads, -1, _DIM), key, value, attn_mask=mask
        ),
        "sdpa": forward(attend, query, key, value, attn_mask=mask, enable_gqa=True),
    }
    if threads > 1 and kv_heads == 1 and not ragged:
        calls["lean, one thread"] = _threaded(forward(lean, query, key, value), 1, threads)
        calls["read, one thread"] = memory_reader(store[:used], 1)
    timings = interleaved(calls, repeats=3 if quick or used > 1 << 28 else 11)
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    seconds = {name: t.median for name, t in timings.items()}
    row = {
        "heads": heads,
        "kv_heads": kv_heads,
        "length": length,
        "ragged": ragged,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "over_sdpa": seconds["sdpa"] / seconds["lean"],
        "over_stacked": seconds["stacked"] / seconds["lean"],
        "bytes_per_second": 4 * used / seconds["lean"],
        "bandwidth_share": seconds["read"] / seconds["lean"],
    }
    if "lean, one thread" in seconds:
        row["threads_over_one"] = seconds["lean, one thread"] / seconds["lean"]
        row["read_threads_over_one"] = seconds["read, one thread"] / seconds["read"]
    return row


def lean_text(found: dict[str, Any]) -> str:
    """Return the measurement as a table, and a line on what the gain is made of."""
    header = ("a token of lean", "lean", "over SDPA", "on rows", "GB/s", "of a plain read",
              "threads over one", "of a plain read")  # fmt: skip
    rows = [
        (
            f"{r['length']:,}{' ragged' if r['ragged'] else ''}, {r['heads']} on {r['kv_heads']}",
            show_seconds(r["seconds"]["lean"]["median"]),
            f"{r['over_sdpa']:.1f}x",
            f"{r['over_stacked']:.1f}x",
            f"{r['bytes_per_second'] / 1e9:.1f}",
            f"{r['bandwidth_share']:.0%}",
            f"{r['threads_over_one']:.2f}x" if "threads_over_one" in r else "-",
            f"{r['read_threads_over_one']:.2f}x" if "threads_over_one" in r else "-",
        )
        for r in found["rows"]
    ]
    form = "the compiled kernel" if found["kernel"] else "operators of torch: no compiler"
    return (
        f"{text_table(header, rows)}\nlean by {form}, heads of {found['head_dim']}: in the mean "
        f"{found['over_sdpa']:.1f}x over SDPA with groups and {found['over_stacked']:.1f}x over "
        "SDPA given\na group's heads as rows: what lies between is that a group shares one reading"
    )


def _bytes(kv_heads: int, length: int, ragged: bool) -> int:
    return 2 * 4 * (4 if ragged else 1) * kv_heads * length * _DIM


def _store(count: int, seed: int) -> Tensor:
    """Return ``count`` numbers: one random block over and over, quicker than to draw all."""
    block = torch.randn(min(count, 1 << 22), generator=torch.Generator().manual_seed(seed))
    return block.repeat(-(-count // len(block)))


def _mean(rows: list[dict[str, Any]], figure: str) -> float:
    return sum(r[figure] for r in rows) / len(rows)


def _threaded(call: Callable[[], Any], number: int, after: int) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(number)
        try:
            call()
        finally:
            torch.set_num_threads(after)

    return run


def memory_reader(numbers: Tensor, threads: int) -> Callable[[], None]:
    """Return a loop that adds numbers up: what memory gives to one that does nothing else."""
    kernels = library("lean")
    if kernels is None:
        return _threaded(numbers.sum, threads, torch.get_num_threads())
    total = torch.zeros(1)
    return lambda: kernels("lean_read", numbers, numbers.numel(), total, threads)
