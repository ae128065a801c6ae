"""Lean attention to padded caches, and on whole, padded and packed sequences.

B batch, H heads, H_kv key-value heads, L query tokens, N capacity of the caches, D head dim,
V value dim.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from manyheads.attention.lean.backward import lean_op
from manyheads.attention.lean.definition import check_lengths
from manyheads.attention.lean.native import can_run, padded_pages, require_native
from manyheads.attention.lean.plan import ORDERS, Order, Plan
from manyheads.attention.lean.run import default_workers, padded_reader, run_plan, settle
from manyheads.attention.softmax.op import softmax
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["IMPLEMENTATIONS", "MANY_QUERIES", "TILE", "Implementation", "lean"]

Implementation = Literal["auto", "native", "lean", "sdpa"]
IMPLEMENTATIONS = ("auto", "native", "lean", "sdpa")

MANY_QUERIES = 64  # from more query tokens than this on, blocks of queries fill the cores already
TILE = 256


@overload
def lean(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ..., workers: int | None = ..., tile: int = ...,
    order: Order = ..., plan: Plan | None = ..., return_lse: Literal[False] = ...,
    implementation: Implementation = ...,
) -> Tensor: ...  # fmt: skip


@overload
def lean(
    query: Tensor, key: Tensor, value: Tensor, *, lengths: Tensor | None = ...,
    is_causal: bool = ..., scale: float | None = ..., mask: Tensor | None = ...,
    cu_seqlens: Tensor | None = ..., workers: int | None = ..., tile: int = ...,
    order: Order = ..., plan: Plan | None = ..., return_lse: Literal[True],
    implementation: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def lean(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    workers: int | None = None,
    tile: int = TILE,
    order: Order = "request",
    plan: Plan | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of a few queries to long caches, dealt evenly to all workers. Exact.

    Every worker reads as many tiles of keys as any other, whatever the lengths of the contexts
    and the number of heads; partial results are merged. The query heads of a key-value head are
    rows of one product, so that keys and values are read once. O(L · sum of lengths · D).

    Args:
        query: (B, H, L, D); few tokens: decoding one, or checking a handful.
        key: (B, H_kv, N, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, N, V).
        lengths: (B,) keys in use of each row, the first ones (None: all). A row without a key
            gives 0, and a logarithm of -inf.
        is_causal: the queries are the last L tokens of each context, and see no later key.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real key, on any side; with L = N and ``is_causal`` it is the
            queries' too, and padded outputs are 0. Excludes ``lengths``.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for L = N.
        workers: number of pieces of equal work (None: torch's threads, or fewer where there is
            little to do). Any number gives the same result up to rounding.
        tile: keys a tile.
        order: of the line of tiles, as in :func:`manyheads.attention.lean.plan`.
        plan: a plan that fits, instead of ``workers``, ``tile`` and ``order``.
        return_lse: also return the logarithms of the sums of e^s, to merge with other parts.
        implementation: "native" (the compiled kernel: float32 queries on the CPU, or narrower
            ones), "lean" (the same by operators of torch), "sdpa" (torch's own, which deals heads
            and blocks of queries, not keys), or "auto": for few queries the kernel where it can
            be had, else "sdpa" where nothing is left to deal: for many queries, little work, one
            thread, or heads that are an even deal by themselves. A plan, the lse or, for few
            queries, ``workers`` ask for a deal.

    Returns:
        (B, H, L, V) in the dtype of ``query``; with ``return_lse`` also (B, H, L), float32 at
        least.

    Raises:
        ValueError: shapes do not fit, arguments exclude each other, a plan for other lengths.
        RuntimeError: "native" cannot be had.

    Example:
        >>> q, k = torch.randn(2, 8, 1, 16), torch.randn(2, 2, 1000, 16)
        >>> lean(q, k, k, lengths=torch.tensor([1000, 30])).shape
        torch.Size([2, 8, 1, 16])
    """
    check_qkv(query, key, value, same_length=is_causal and lengths is None and mask is not None)
    batch, _, length, _ = query.shape
    mask = check_mask(mask, batch, key.shape[2])
    if implementation not in IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, IMPLEMENTATIONS)
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    if lengths is not None and mask is not None:
        raise ValueError("give lengths or mask, not both: mask.sum(1) are the lengths")
    if cu_seqlens is not None:
        if mask is not None or lengths is not None or return_lse or plan is not None:
            raise ValueError("cu_seqlens excludes mask, lengths, plan and return_lse")
        (out,) = map_packed(
            lambda q, k, v, m: lean(
                q, k, v, is_causal=is_causal, scale=scale, mask=m, workers=workers, tile=tile,
                order=order, implementation=implementation,
            ),
            (query, key, value),
            cu_seqlens,
        )  # fmt: skip
        return out
    compiling = torch.compiler.is_compiling()
    if lengths is not None and not compiling:
        lengths = check_lengths(lengths, batch, key.shape[2])
    asked = plan is not None or return_lse
    if implementation == "native" and not compiling:
        require_native(query, key, value)
    choice = _choose(
        query, key, value, lengths, is_causal, implementation, asked=asked,
        named=workers is not None, masked=mask is not None, tile=tile,
    )  # fmt: skip
    if choice == "sdpa":
        return _sdpa(query, key, value, lengths, is_causal=is_causal, scale=scale, mask=mask)
    late = None
    if mask is not None:
        early = compact(mask)
        key, value, lengths = early.gather(key, dim=2), early.gather(value, dim=2), mask.sum(1)
        if is_causal:
            # The queries are the last tokens of their context: real ones go to the end.
            late = compact(~mask)
            query = late.gather(query, dim=2)
    if lengths is None:
        lengths = torch.full((batch,), key.shape[2], device=query.device)
    out, lse = _dealt(
        query, key, value, lengths, is_causal=is_causal and length > 1, scale=scale,
        workers=workers, tile=tile, order=order, dealt=plan, native=choice == "native",
    )  # fmt: skip
    if late is not None and mask is not None:
        out = late.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
        lse = late.scatter(lse, dim=2).masked_fill(~mask[:, None], -torch.inf)
    return (out, lse) if return_lse else out


def _choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    is_causal: bool,
    implementation: Implementation,
    *,
    asked: bool,
    named: bool,
    masked: bool,
    tile: int,
) -> Literal["native", "lean", "sdpa"]:
    length, capacity = query.shape[2], key.shape[2]
    fits = not is_causal or length == 1 or (lengths is None and length == capacity)
    if implementation == "sdpa" and (not fits or asked):
        raise ValueError(
            "implementation='sdpa' returns no lse, follows no plan, and is causal only for as "
            f"many queries as keys, not {length} and {capacity}: use 'auto' or 'lean'"
        )
    if implementation != "auto":
        return implementation
    # A mask asks for copies of the caches, a gradient for a pass that torch's own does better.
    plain = not masked and not _recorded(query, key, value)
    if torch.compiler.is_compiling():
        # Neither threads nor lengths are known yet; the operator finds out whether the kernel
        # can be had when it runs.
        few = length <= MANY_QUERIES and query.device.type == "cpu"
        if asked or not fits or lengths is not None:
            return "native"
        return "native" if few and plain and query.dtype == torch.float32 else "sdpa"
    native = can_run(query, key, value)
    if asked or not fits:
        return "native" if native else "lean"
    if length > MANY_QUERIES:
        return "sdpa"
    if named or (native and plain):
        return "native" if native else "lean"
    sizes = [capacity] * len(key) if lengths is None else lengths.tolist()
    workers = default_workers(sizes, heads=key.shape[1], tile=tile)
    # Heads are an even deal by themselves if their number is a multiple of the workers'.
    even = len(set(sizes)) == 1 and len(sizes) * key.shape[1] % workers == 0
    return "sdpa" if even or workers == 1 else "lean"


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    length, heads = query.shape[2], key.shape[1]
    if is_causal and length > 1:
        return softmax(query, key, value, is_causal=True, scale=scale, mask=mask)
    rows = query.unflatten(1, (heads, -1)).flatten(2, 3)  # (B, H_kv, G L, D)
    if lengths is None:
        out = softmax(rows, key, value, scale=scale, mask=mask)
    else:
        sizes = lengths.tolist()
        if len(set(sizes)) == 1:
            stretches = [slice(None)]
        else:
            stretches = [slice(b, b + 1) for b in range(len(sizes))]
        parts = [
            softmax(rows[s], *(t[s, :, : sizes[s.start or 0]] for t in (key, value)), scale=scale)
            for s in stretches
        ]
        out = torch.cat(parts)
        out = out.masked_fill((lengths == 0).view(-1, 1, 1, 1), 0)
    return out.unflatten(2, (-1, length)).flatten(1, 2)


def _dealt(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    *,
    is_causal: bool,
    scale: float | None,
    workers: int | None,
    tile: int,
    order: Order,
    dealt: Plan | None,
    native: bool,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    q = query.to(torch.promote_types(query.dtype, torch.float32))
    if torch.compiler.is_compiling():
        out, lse = lean_op(
            q, key, value, lengths, scale, is_causal, workers or 0, tile, order, MANY_QUERIES,
            native,
        )  # fmt: skip
        return out.to(query.dtype), lse
    sizes = lengths.tolist()
    dealt = settle(
        dealt, sizes, heads=key.shape[1], queries=query.shape[2], is_causal=is_causal,
        workers=workers, tile=tile, order=order,
    )  # fmt: skip
    if _recorded(query, key, value):
        out, lse = lean_op(
            q, key, value, lengths, scale, is_causal, dealt.workers or 1, dealt.tile, dealt.order,
            dealt.query_tile, native,
        )  # fmt: skip
    else:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = run_plan(
                q, padded_reader(key, value), sizes, dealt, scale=scale, dim=value.shape[-1],
                pages=padded_pages(key, value) if native else None,
            )  # fmt: skip
    return out.to(query.dtype), lse


def _recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
