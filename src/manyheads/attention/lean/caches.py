"""Lean attention to packed and to paged caches, and the partial results of single segments.

B batch, H heads, H_kv key-value heads, L query tokens, D head dim, V value dim, T packed tokens,
P pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from manyheads.attention.lean.definition import check_lengths
from manyheads.attention.lean.merge import Partial
from manyheads.attention.lean.native import (
    Pages,
    can_run,
    packed_pages,
    paged_pages,
    require_native,
)
from manyheads.attention.lean.plan import Order, Plan
from manyheads.attention.lean.run import Reader, padded_reader, run_plan, run_segments, settle
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_cu_seqlens

__all__ = ["lean_packed", "lean_paged", "lean_partials"]


def lean_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    workers: int | None = None,
    tile: int = 256,
    order: Order = "request",
    plan: Plan | None = None,
    implementation: Literal["auto", "native", "lean"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Lean attention to caches that lie one behind another. Exact; for decoding: no gradients.

    Args:
        query: (B, H, L, D).
        key: (T, H_kv, D); value: (T, H_kv, V): the contexts of all requests.
        cu_seqlens: (B + 1) their borders.
        is_causal, scale, workers, tile, order, plan: as in :func:`manyheads.attention.lean`.
        implementation: "native", the compiled kernel; "lean", operators of torch; or "auto": the
            kernel where it can be had.

    Returns:
        The output (B, H, L, V) and the logarithms of the sums (B, H, L).

    Raises:
        ValueError: shapes or borders do not fit, or a gradient is asked for.
        RuntimeError: "native" cannot be had.
    """
    if key.ndim != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"packed key has shape {tuple(key.shape)} and value {tuple(value.shape)}, expected "
            "(tokens, kv_heads, head_dim) with the same tokens and heads"
        )
    borders = check_cu_seqlens(cu_seqlens, 1, key.shape[0])
    sizes = [b - a for a, b in pairwise(borders)]

    def read(request: int, heads: slice, keys: slice) -> tuple[Tensor, Tensor]:
        span = slice(borders[request] + keys.start, borders[request] + keys.stop)
        return key[span, heads].transpose(0, 1), value[span, heads].transpose(0, 1)

    return _decode(
        query, key, value, read, sizes, partial(packed_pages, key, value, borders),
        heads=key.shape[1], is_causal=is_causal, scale=scale, workers=workers, tile=tile,
        order=order, dealt=plan, implementation=implementation,
    )  # fmt: skip


def lean_paged(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    workers: int | None = None,
    tile: int = 256,
    order: Order = "request",
    plan: Plan | None = None,
    implementation: Literal["auto", "native", "lean"] = "auto",
) -> tuple[Tensor, Tensor]:
    """Lean attention to caches scattered over pages. Exact; for decoding: no gradients.

    Args:
        query: (B, H, L, D).
        key_pages: (P, H_kv, page, D); value_pages: (P, H_kv, page, V).
        page_table: (B, most pages) numbers of the pages of each request, in order; what stands
            behind the last one in use is not looked at.
        lengths: (B,) keys in use.
        is_causal, scale, workers, tile, order, plan: as in :func:`manyheads.attention.lean`; a
            tile may be larger or smaller than a page.
        implementation: "native", the compiled kernel, which copies no page; "lean", operators of
            torch; or "auto": the kernel where it can be had.

    Returns:
        The output (B, H, L, V) and the logarithms of the sums (B, H, L).

    Raises:
        ValueError: shapes do not fit, a page in use is not there, or a gradient is asked for.
        RuntimeError: "native" cannot be had.
    """
    if key_pages.ndim != 4 or value_pages.shape[:3] != key_pages.shape[:3]:
        raise ValueError(
            f"key_pages has shape {tuple(key_pages.shape)} and value_pages "
            f"{tuple(value_pages.shape)}, expected (pages, kv_heads, page, head_dim) alike"
        )
    page = key_pages.shape[2]
    if page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"page_table has shape {tuple(page_table.shape)}, expected (batch, pages) with batch "
            f"{query.shape[0]}"
        )
    sizes = check_lengths(lengths, query.shape[0], page_table.shape[1] * page).tolist()
    table = page_table.tolist()
    for row, (pages, size) in enumerate(zip(table, sizes, strict=True)):
        wrong = [p for p in pages[: -(-size // page)] if not 0 <= p < len(key_pages)]
        if wrong:
            raise ValueError(
                f"page_table row {row} names page {wrong[0]}: there are {len(key_pages)} pages"
            )

    def read(request: int, heads: slice, keys: slice) -> tuple[Tensor, Tensor]:
        pages = table[request][keys.start // page : -(-keys.stop // page)]
        first = keys.start // page * page
        own = slice(keys.start - first, keys.stop - first)
        if len(pages) == 1:
            return key_pages[pages[0], heads, own], value_pages[pages[0], heads, own]
        index = torch.tensor(pages, device=key_pages.device)
        key, value = (
            t[:, heads].index_select(0, index).transpose(0, 1).flatten(1, 2)[:, own]
            for t in (key_pages, value_pages)
        )
        return key, value

    return _decode(
        query, key_pages, value_pages, read, sizes,
        partial(paged_pages, key_pages, value_pages, page_table), heads=key_pages.shape[1],
        is_causal=is_causal, scale=scale, workers=workers, tile=tile, order=order, dealt=plan,
        implementation=implementation,
    )  # fmt: skip


def lean_partials(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> list[Partial]:
    """Return the partial result of every segment of a plan: to be kept, sent or merged later.

    Args:
        query: (B, H, L, D); key, value: (B, H_kv, N, D and V), padded caches.
        plan: which segments there are.
        lengths: (B,) keys in use (None: all).
        scale: factor on the scores, D ** -0.5 unless given.

    Returns:
        In the order of ``plan.segments``, parts (R) and (R, V); rows are the query heads of a
        key-value head times the tokens of a block. No gradients.

    Raises:
        ValueError: shapes do not fit, a plan for others, or a gradient is asked for.
    """
    check_qkv(query, key, value)
    _no_gradient(query, key, value)
    sizes = [key.shape[2]] * key.shape[0]
    if lengths is not None:
        sizes = check_lengths(lengths, key.shape[0], key.shape[2]).tolist()
    dealt = settle(
        plan, sizes, heads=key.shape[1], queries=query.shape[2], is_causal=plan.is_causal,
        workers=None, tile=plan.tile, order=plan.order,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q = query.to(torch.promote_types(query.dtype, torch.float32))
    with torch.autocast(q.device.type, enabled=False):
        return run_segments(
            q, padded_reader(key, value), sizes, dealt, scale=scale, dim=value.shape[-1]
        )


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    read: Reader,
    sizes: Sequence[int],
    places: Callable[[], Pages],
    *,
    heads: int,
    is_causal: bool,
    scale: float | None,
    workers: int | None,
    tile: int,
    order: Order,
    dealt: Plan | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if implementation not in ("auto", "native", "lean"):
        raise unknown_name("implementation", implementation, ("auto", "native", "lean"))
    if query.ndim != 4 or query.shape[0] != len(sizes):
        raise ValueError(
            f"query has shape {tuple(query.shape)}, expected (batch, heads, length, head_dim) "
            f"with batch {len(sizes)}"
        )
    if query.shape[3] != key.shape[-1]:
        raise ValueError(f"head_dim of query and key differ: {query.shape[3]} and {key.shape[-1]}")
    if query.shape[1] % heads:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {heads}")
    _no_gradient(query, key, value)
    if implementation == "native":
        require_native(query, key, value)
    native = implementation != "lean" and can_run(query, key, value)
    is_causal = is_causal and query.shape[2] > 1
    dealt = settle(
        dealt, sizes, heads=heads, queries=query.shape[2], is_causal=is_causal, workers=workers,
        tile=tile, order=order,
    )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q = query.to(torch.promote_types(query.dtype, torch.float32))
    with torch.autocast(q.device.type, enabled=False):
        out, lse = run_plan(
            q, read, sizes, dealt, scale=scale, dim=value.shape[-1],
            pages=places() if native else None,
        )  # fmt: skip
    return out.to(query.dtype), lse


def _no_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise ValueError(
            "this form has no gradient: call it under torch.no_grad(), or lean() on padded caches"
        )
