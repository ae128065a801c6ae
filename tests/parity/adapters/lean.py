"""Lean attention, its plans, the rules of three schedulers and the merge of partial results."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from manyheads.attention import lean_packed, merge_partials
from manyheads.attention.lean import (
    Partial,
    Plan,
    aiter_schedule,
    flash_splits,
    lean_partials,
    onnxruntime_schedule,
    partial_attention,
    plan,
    tile_keys,
)
from parity.golden import Golden, adapter

_KERNEL = (
    "batch", "context", "heads", "kv_heads", "head_dim", "queries_per_request", "tile_n",
    "requested_workers", "workers", "high_load_workers", "max_tiles_per_worker", "tiles_per_head",
    "num_splits", "even_split",
)  # fmt: skip


@adapter("lean", "even_split", "ragged_gqa", "ragged_single_long")
def kernel(golden: Golden) -> dict[str, Tensor]:
    golden.options(*_KERNEL)
    c = golden.config
    lengths = golden.inputs["context_lengths"].tolist()
    q, k, v = (golden.inputs[n] for n in "qkv")
    query = q.unflatten(0, (len(lengths), -1)).transpose(1, 2)  # (B, H, M, D)
    schedule = aiter_schedule(
        lengths, heads=c["heads"], workers=c["requested_workers"], tile=c["tile_n"]
    )
    assert schedule == (
        c["workers"], c["max_tiles_per_worker"], c["high_load_workers"], c["num_splits"],
        c["even_split"],
    )  # fmt: skip
    # That kernel deals query heads: every one reads its keys itself.
    dealt = plan(
        lengths, heads=c["heads"], workers=schedule.workers, tile=c["tile_n"],
        queries=query.shape[2], query_tile=query.shape[2],
    )  # fmt: skip
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out, _ = lean_packed(query, k, v, cu_seqlens, workers=c["workers"], tile=c["tile_n"])
    repeated = [t.repeat_interleave(c["heads"] // c["kv_heads"], 1) for t in (k, v)]
    key, value = (_padded(t, lengths) for t in repeated)
    parts = lean_partials(query, key, value, dealt, lengths=torch.tensor(lengths))
    return {
        "out.out": out.transpose(1, 2).flatten(0, 1),
        "out.work_ranges": torch.tensor(list(pairwise(dealt.borders))),
        "out.schedule": torch.tensor([
            (s.worker, s.head, s.request, s.first, s.end, s.host, s.finishing)
            for s in dealt.segments
        ]),
        **_scratch(dealt, parts, query.shape[2], v.shape[-1]),
    }  # fmt: skip


def _padded(packed: Tensor, lengths: list[int]) -> Tensor:
    rows = torch.nn.utils.rnn.pad_sequence(list(packed.split(lengths)), batch_first=True)
    return rows.transpose(1, 2)


def _scratch(dealt: Plan, parts: list[Partial], rows: int, dim: int) -> dict[str, Tensor]:
    """Return what the kernel writes to memory: parts that are no host's, in base 2."""
    m, sums = torch.zeros(dealt.workers, rows), torch.zeros(dealt.workers, rows)
    o, written = torch.zeros(dealt.workers, rows, dim), torch.zeros(dealt.workers)
    for s, part in zip(dealt.segments, parts, strict=True):
        if not s.host:
            written[s.worker] += 1
            m[s.worker], sums[s.worker], o[s.worker] = part.m / math.log(2), part.l, part.o
    return {
        "out.partial_m": m,
        "out.partial_l": sums,
        "out.partial_o": o,
        "out.partial_written": written,
    }


@adapter("lean", "schedule_table")
def aiter(golden: Golden) -> dict[str, Tensor]:
    golden.options("columns")
    rows = []
    for row in golden.outputs["rows"].tolist():
        at_hand, batch, heads, context, tile = row[:5]
        lengths = [context] * batch
        blocks = -(-context // tile)
        s = aiter_schedule(lengths, heads=heads, workers=at_hand, tile=tile)
        rows.append([
            at_hand, batch, heads, context, tile, 1, blocks, s.high_load, s.largest,
            blocks * batch, s.workers, s.num_splits, s.is_even,
        ])  # fmt: skip
        dealt = plan(lengths, heads=heads, workers=s.workers, tile=tile)
        assert (dealt.workers, max(dealt.loads), dealt.high_load) == (
            s.workers, s.largest, s.high_load
        )  # fmt: skip
        assert dealt.num_splits <= s.num_splits
    return {"out.rows": torch.tensor(rows)}


@adapter("lean", "schedule_onnxruntime")
def onnxruntime(golden: Golden) -> dict[str, Tensor]:
    golden.options("columns")
    rows = []
    for row in golden.outputs["rows"].tolist():
        sms, batch, heads, kv_heads, head_dim, context = row[:6]
        s = onnxruntime_schedule(
            sms=sms, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            context=context,
        )  # fmt: skip
        tile = tile_keys(head_dim)
        dealt = plan(
            [context] * batch, heads=kv_heads, workers=s.workers, tile=tile, order="request"
        )
        blocks = -(-context // tile)
        rows.append([
            *row[:6], tile, blocks, blocks, dealt.total, dealt.workers, max(dealt.loads),
            dealt.high_load, s.num_splits,
        ])  # fmt: skip
    return {"out.rows": torch.tensor(rows)}


@adapter("lean", "flash_decoding_splits")
def splits(golden: Golden) -> dict[str, Tensor]:
    golden.options("columns")
    rows = []
    for row in golden.outputs["rows"].tolist():
        sms, batch, _, kv_heads, head_dim, context = row[:6]
        blocks = -(-context // tile_keys(head_dim))
        rows.append([*row[:6], flash_splits(batch * kv_heads, blocks, sms=sms)])
    return {"out.rows": torch.tensor(rows)}


@adapter("lean", "merge_operator")
def merge(golden: Golden) -> dict[str, Tensor]:
    golden.options("head_dim", "pieces", "scale")
    query = golden.inputs["q"]
    parts = [
        partial_attention(query, golden.inputs[f"k{i}"], golden.inputs[f"v{i}"])
        for i in range(len(golden.config["pieces"]))
    ]
    whole = merge_partials(Partial(*map(torch.stack, zip(*parts, strict=True))))
    names = ("m", "l", "o")
    return {
        "out.attention": whole.out,
        "out.lse": whole.lse,
        **{f"out.merged_{n}": t for n, t in zip(names, whole, strict=True)},
        **{f"out.{n}{i}": t for i, p in enumerate(parts) for n, t in zip(names, p, strict=True)},
    }
