"""Lean attention: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from manyheads.attention import lean, lean_reference
from manyheads.attention.lean import Device, plan, simulate
from manyheads.choose.bench.lean import lean_case
from manyheads.choose.timing import interleaved
from manyheads.native import library
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "occupancies"]

Progress = Callable[[str], None]

_DEVICES = {"A100": 108, "H100": 132}
_CASES = {
    "1 request, 32 heads, 256k": ((262144,), 32),
    "2 requests, 56 heads, 64k": ((65536,) * 2, 56),
    "1 request, 8 heads, 256k": ((262144,), 8),
    "4 requests, 48 heads, 64k": ((65536,) * 4, 48),
    "1k, 1k, 1k and 256k, 8 heads": ((1024, 1024, 1024, 262144), 8),
}
_LONG, _DIM = 65536, 128


def occupancies(sms: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return occupancy, makespan and pieces by case and method, a worker a multiprocessor.

    Without overheads: tiles of 128 keys take the same time everywhere, and merges none.
    """
    return {
        name: {
            method: {"occupancy": s.occupancy, "makespan": s.makespan, "splits": s.splits}
            for method in ("lean", "flash", "fa2")
            for s in [simulate(lengths, heads=heads, method=method, device=Device(sms=sms))]
        }
        for name, (lengths, heads) in _CASES.items()
    }


def measure(progress: Progress) -> Measurement:
    """Simulate occupancy, then measure exactness and time against torch's own attention."""
    progress("occupancy of 108 and 132 multiprocessors")
    tables = {device: occupancies(sms) for device, sms in _DEVICES.items()}
    checks = [c for device, table in tables.items() for c in _occupancy(device, table)]
    error = _error(progress)
    checks.append(
        Check(
            what="largest difference from dense attention in float64, ragged batches",
            claimed="exact",
            measured=error,
            direction=error < 1e-4,
            size=error <= 1e-5,
            bound="at most 1e-5 in float32",
        )
    )
    rows = _rows(progress)
    checks += _speed(rows)
    own = {
        f"{r['length']}{' ragged' if r['ragged'] else ''}, {r['heads']} on {r['kv_heads']}": r
        for r in rows
    }
    return Measurement(
        checks=tuple(checks),
        figures={
            "occupancy": tables,
            "tokens": {
                name: {k: v for k, v in r.items() if isinstance(v, float)}
                | {"seconds": {call: t["median"] for call, t in r["seconds"].items()}}
                for name, r in own.items()
            },
            "kernel": library("lean") is not None,
            "threads": torch.get_num_threads(),
            "two_threads_over_one_product": _scaling(progress),
            "even_load": plan([_LONG], heads=1, workers=2).balance,
        },
        notes=(
            *(_line(device, table) for device, table in tables.items()),
            *(
                f"{name}: {r['seconds']['lean']['median'] * 1e3:.2f} ms, "
                f"{r['over_sdpa']:.1f}x over SDPA with groups, "
                f"{r['over_stacked']:.1f}x over SDPA given a group's heads as rows, "
                f"{r['bandwidth_share']:.0%} of a plain read's pace"
                for name, r in own.items()
            ),
            "the gain over SDPA with groups is first of all that a group's heads share one "
            "reading of the cache: SDPA that is given them as rows does so too",
            "occupancies are of a model without overheads; nothing was run on a GPU",
        ),
    )


def _speed(rows: list[dict[str, Any]]) -> list[Check]:
    """Judge the time of a token: against torch's, against memory, and by threads."""

    def mean(figure: str) -> float:
        return sum(r[figure] for r in rows) / len(rows)

    share = min(r["bandwidth_share"] for r in rows if r["length"] >= _LONG)
    checks = [
        Check(
            what="CPU: a token at 4k to 256k, one request and ragged four, over SDPA with groups",
            claimed="2.6 over FlashAttention-2 on a GPU, in the mean",
            measured=mean("over_sdpa"),
            unit="x",
            direction=mean("over_sdpa") > 1,
            size=mean("over_sdpa") >= 6,
            bound="mean, at least 6",
        ),
        Check(
            what="CPU: the same over SDPA that is given a group's heads as rows",
            claimed="not in the paper",
            measured=mean("over_stacked"),
            unit="x",
            direction=mean("over_stacked") > 1,
            size=mean("over_stacked") >= 1.5,
            bound="mean, at least 1.5",
        ),
        Check(
            what="CPU: bytes a second over those of a plain read, from 64k on",
            claimed="not in the paper",
            measured=share,
            unit="x",
            direction=share > 0.5,
            size=share >= 0.7,
            bound="least, at least 0.7",
        ),
    ]
    if two := [r for r in rows if r["length"] >= _LONG and "threads_over_one" in r]:
        gain = sum(r["threads_over_one"] for r in two) / len(two)
        read = sum(r["read_threads_over_one"] for r in two) / len(two)
        checks.append(
            Check(
                what=f"CPU: {torch.get_num_threads()} threads over one, one request, one "
                "key-value head, from 64k on",
                claimed="near the number of workers",
                measured=gain,
                unit="x",
                direction=gain > 1,
                size=gain >= 1.6,
                bound=f"at least 1.6; a plain read gains {read:.2f}",
            )
        )
    return checks


def _rows(progress: Progress) -> list[dict[str, Any]]:
    """Time a token of 8 query heads on one key-value head, and of 32 on 8."""
    cases = [(8, 1, n, ragged) for n in (4096, _LONG, 4 * _LONG) for ragged in (False, True)]
    cases += [(32, 8, n, False) for n in (4096, _LONG)]
    numbers = max(2 * kv * n * (4 if r else 1) * _DIM for _, kv, n, r in cases)
    store = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0))
    store = store.repeat(-(-numbers // len(store)))
    rows = []
    for heads, kv_heads, length, ragged in cases:
        kind = ", ragged" if ragged else ""
        progress(f"a token at {length:,}{kind}, {heads} heads on {kv_heads}, against SDPA")
        rows.append(lean_case(store, heads=heads, kv_heads=kv_heads, length=length, ragged=ragged))
    return rows


def _occupancy(device: str, table: dict[str, dict[str, dict[str, float]]]) -> list[Check]:
    least = min(row["lean"]["occupancy"] for row in table.values())
    others = {m: min(row[m]["occupancy"] for row in table.values()) for m in ("flash", "fa2")}
    ragged = table["1k, 1k, 1k and 256k, 8 heads"]
    gain = ragged["flash"]["makespan"] / ragged["lean"]["makespan"]
    return [
        Check(
            what=f"{device}: least occupancy of {len(table)} batches, simulated",
            claimed="near 1 for any context length",
            measured=least,
            direction=all(
                r["lean"]["occupancy"] >= r["flash"]["occupancy"] for r in table.values()
            ),
            size=least >= 0.98,
            bound=f"at least 0.98; FlashDecoding {others['flash']:.2f}, "
            f"FlashAttention-2 {others['fa2']:.2f}",
        ),
        Check(
            what=f"{device}: FlashDecoding's time over lean's, contexts of 1k, 1k, 1k and 256k",
            claimed="up to 2.18 at 256k",
            measured=gain,
            unit="x",
            direction=gain > 1,
            size=gain >= 2.18,
            bound="at least 2.18",
        ),
    ]


def _line(device: str, table: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = (
        f"{name}: " + ", ".join(f"{m} {r[m]['occupancy']:.2f}" for m in ("lean", "flash", "fa2"))
        for name, r in table.items()
    )
    return f"occupancy of {device}, {_DEVICES[device]} multiprocessors: {'; '.join(rows)}"


def _error(progress: Progress) -> float:
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for round_ in range(4):
        progress(f"exactness, batch {round_ + 1} of 4")
        lengths = torch.randint(1, 5001, (4,), generator=generator)
        most = int(lengths.max())
        q, k, v = (
            torch.randn(4, h, n, 64, generator=generator) for h, n in ((8, 1), (2, most), (2, most))
        )
        out = lean(q, k, v, lengths=lengths, workers=3 + 7 * round_)
        dense = lean_reference(q.double(), k.double(), v.double(), lengths=lengths)
        worst = max(worst, float((out - dense).abs().max()))
    return worst


def _scaling(progress: Progress) -> float:
    """Return how many times as fast all threads make a product that one thread makes too."""
    progress("what another thread is worth here")
    threads = torch.get_num_threads()
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))

    def product(number: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(number)
            torch.mm(x, x)

        return run

    try:
        times = interleaved({"one": product(1), "all": product(threads)}, repeats=15)
    finally:
        torch.set_num_threads(threads)
    return times["one"].median / times["all"].median


PAPER = Paper(
    slug="lean",
    title=(
        "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of "
        "Transformers"
    ),
    arxiv="2405.10480",
    summary=(
        "Exact softmax attention of one token, or a few, to long key-value caches. The tiles of "
        "all contexts stand in one line that is dealt to workers in equal pieces, whatever the "
        "lengths and the number of heads, and partial results are merged by an associative "
        "operator. For decoding; training runs as softmax does."
    ),
    implements=(
        "manyheads.attention.lean",
        "manyheads.attention.lean_packed",
        "manyheads.attention.lean_paged",
        "manyheads.attention.merge_partials",
        "manyheads.attention.LeanAttention",
    ),
    recipe="manyheads train lm --mixers lean*4",
    claim=Claim(
        statement=(
            "Decoding keeps nearly all multiprocessors busy for any context length, and is 2.6 "
            "times as fast as FlashAttention-2 and 1.73 times as fast as FlashDecoding in the mean."
        ),
        measure=measure,
    ),
)
