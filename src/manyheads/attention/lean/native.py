"""A plan carried out by the compiled kernel: caches are read where they lie, once.

B batch, H heads, H_kv key-value heads, L query tokens, D head dim, V value dim, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from manyheads.attention.lean.plan import Plan
from manyheads.native import library, require, strided

__all__ = [
    "Pages",
    "can_run",
    "packed_pages",
    "padded_pages",
    "paged_pages",
    "require_native",
    "run_native",
]

Strides = tuple[int, int, int]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LANES = 16  # of a vector in csrc/vec.h
_KEYS = 32  # that csrc/lean.cpp takes at a time
_WHOLE = 1 << 62  # a page that no context passes the end of


@dataclass(frozen=True, kw_only=True, slots=True)
class Pages:
    """Where keys and values lie.

    Attributes:
        key, value: the tensors that hold them.
        table: (B, P) numbers of the pages of each request.
        size: tokens of a page.
        key_strides, value_strides: of a page, a head and a token, in numbers.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    size: int
    key_strides: Strides
    value_strides: Strides


def padded_pages(key: Tensor, value: Tensor) -> Pages:
    """Return the places of caches (B, H_kv, N, D) and (B, H_kv, N, V): a page a request."""
    k, v = key.stride(), value.stride()
    return Pages(
        key=key, value=value, table=torch.arange(len(key))[:, None], size=_WHOLE,
        key_strides=(k[0], k[1], k[2]), value_strides=(v[0], v[1], v[2]),
    )  # fmt: skip


def packed_pages(key: Tensor, value: Tensor, borders: Sequence[int]) -> Pages:
    """Return the places of caches (T, H_kv, D) and (T, H_kv, V) that are cut at ``borders``."""
    k, v = key.stride(), value.stride()
    return Pages(
        key=key, value=value, table=torch.tensor(borders[:-1])[:, None], size=_WHOLE,
        key_strides=(k[0], k[1], k[0]), value_strides=(v[0], v[1], v[0]),
    )  # fmt: skip


def paged_pages(key: Tensor, value: Tensor, table: Tensor) -> Pages:
    """Return the places of caches (P, H_kv, page, D) and (P, H_kv, page, V) by their table."""
    k, v = key.stride(), value.stride()
    return Pages(
        key=key, value=value, table=table.long().contiguous(), size=key.shape[2],
        key_strides=(k[0], k[1], k[2]), value_strides=(v[0], v[1], v[2]),
    )  # fmt: skip


def can_run(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the kernel can do it: float32 queries, or narrower ones, which become so,
    caches in one of float32, bfloat16 and float16 whose numbers of a token lie side by side.

    A dispatch mode (a counter of FLOPs) is to see operators of torch: not in there.
    """
    return (
        query.dtype in _DTYPES
        and key.dtype == value.dtype
        and key.dtype in _DTYPES
        and all(t.device.type == "cpu" for t in (query, key, value))
        and all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in (key, value))
        and not is_in_torch_dispatch_mode()
        and library("lean") is not None
    )


def require_native(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Make sure that the kernel can do it.

    Raises:
        RuntimeError: it cannot; says why and what to do.
    """
    if can_run(query, key, value):
        return
    if all(t.dtype in _DTYPES and t.device.type == "cpu" for t in (query, key, value)):
        require("lean", like=query.float())
    raise RuntimeError(
        "implementation='native' takes float32, bfloat16 or float16 on the CPU, key and value "
        "alike, whose numbers of a token lie side by side, and no dispatch mode (a counter of "
        f"FLOPs); here are query {_told(query)}, key {_told(key)}, value {_told(value)}: "
        "use implementation='auto'"
    )


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"


def run_native(
    query: Tensor, pages: Pages, lengths: Sequence[int], dealt: Plan, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend as planned. Arguments and results as of :func:`run_plan`, the query in float32."""
    batch, heads, length, dim = query.shape
    group, value_dim = heads // dealt.heads, pages.value.shape[-1]
    out = query.new_zeros(batch, heads, length, value_dim)
    lse = query.new_full((batch, heads, length), -torch.inf)
    kernels = library("lean")
    if kernels is None or not dealt.segments or not query.numel() or not value_dim:
        return out, lse
    table, borders, places = _table(dealt)
    width, value_width = (-(-n // _LANES) * _LANES for n in (dim, value_dim))
    threads = min(torch.get_num_threads(), dealt.workers)
    rows = group * min(dealt.query_tile, dealt.queries)
    each = rows * (width + _KEYS + 1) + _KEYS * (width + value_width)
    each = -(-each // _LANES) * _LANES
    kernels(
        "lean_decode",
        query.contiguous(),
        strided(pages.key),
        *pages.key_strides,
        strided(pages.value),
        *pages.value_strides,
        _DTYPES[pages.key.dtype],
        pages.table,
        pages.table.shape[1],
        pages.size,
        torch.tensor(lengths),
        table,
        len(dealt.segments),
        borders,
        dealt.workers,
        query.new_empty(places * group),
        query.new_empty(places * group),
        query.new_empty(places * group, value_width),
        out,
        lse,
        query.new_empty(threads * each),
        each,
        dealt.heads,
        group,
        length,
        dim,
        value_dim,
        dealt.tile,
        dealt.is_causal,
        threads,
        scale,
    )
    return out, lse


_tables: dict[int, tuple[Plan, Tensor, Tensor, int]] = {}


def _table(dealt: Plan) -> tuple[Tensor, Tensor, int]:
    """Return the segments (S, 8), the borders of the workers' and the query tokens of all.

    Remembered by the plan's identity: to compare plans costs as much as to tell this again.
    """
    known = _tables.get(id(dealt))
    if known is not None and known[0] is dealt:
        return known[1:]
    rows, places = [], 0
    borders = [0] * (dealt.workers + 1)
    for s in dealt.segments:
        first = s.block * dealt.query_tile
        number = min(dealt.query_tile, dealt.queries - first)
        rows.append((s.request, s.head, first, number, s.first, s.end, s.host, places))
        places += number
        borders[s.worker + 1] = len(rows)
    if len(_tables) >= 64:
        _tables.pop(next(iter(_tables)))
    _tables[id(dealt)] = dealt, torch.tensor(rows), torch.tensor(borders), places
    return _tables[id(dealt)][1:]
