"""Lean attention: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from manyheads.attention import lean, lean_reference
from manyheads.attention.lean import Device, plan, simulate
from manyheads.choose.timing import Timings, forward, interleaved
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
_LONG, _DIM, _GROUP = 65536, 128, 8


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
    times = _times(progress)
    scaling = _scaling(progress)
    against = times["sdpa"].median / times["lean"].median
    checks.append(
        Check(
            what="CPU: a token at 64k, 8 query heads on 1 key-value head, over SDPA with grouping",
            claimed="2.6 over FlashAttention-2 on a GPU, in the mean",
            measured=against,
            unit="x",
            direction=against > 1,
            size=against >= 1.5,
            bound="at least 1.5",
        )
    )
    return Measurement(
        checks=tuple(checks),
        figures={
            "occupancy": tables,
            "seconds": {name: t.median for name, t in times.items()},
            "threads": torch.get_num_threads(),
            "two_workers_over_one": times["one worker"].median / times["two workers"].median,
            "two_threads_over_one": scaling,
            "even_load": plan([_LONG], heads=1, workers=2).balance,
        },
        notes=(
            *(_line(device, table) for device, table in tables.items()),
            f"the same token with its 8 query heads as rows, {torch.get_num_threads()} threads: "
            f"one worker {times['one worker'].median * 1e3:.1f} ms, two "
            f"{times['two workers'].median * 1e3:.1f} ms, SDPA on stacked rows "
            f"{times['stacked'].median * 1e3:.1f} ms, SDPA with grouping "
            f"{times['sdpa'].median * 1e3:.1f} ms",
            "the gain over SDPA with grouping is first of all that a group's heads share one "
            "reading of the cache: SDPA that is given them as rows does so too, but deals no keys",
            f"in this run {torch.get_num_threads()} threads made a matrix product {scaling:.2f} "
            "times as fast as one did: compare two workers with one by that",
            "occupancies are of a model without overheads; nothing was run on a GPU",
        ),
    )


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


def _times(progress: Progress) -> Timings:
    progress("a token at 64k, against SDPA")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, _GROUP, 1, _DIM, generator=generator)
    key, value = (torch.randn(1, 1, _LONG, _DIM, generator=generator) for _ in range(2))
    attend = F.scaled_dot_product_attention
    return interleaved(
        {
            "lean": forward(lean, query, key, value),
            "one worker": forward(lean, query, key, value, workers=1),
            "two workers": forward(lean, query, key, value, workers=2),
            "stacked": forward(attend, query.transpose(1, 2), key, value),
            "sdpa": forward(attend, query, key, value, enable_gqa=True),
        },
        repeats=15,
    )


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
