"""When would each worker of a device be busy? Lean attention, FlashDecoding, FlashAttention-2.

A model of time in units of your choice: a tile takes ``t_tile``, every stretch of tiles of one
output tile ``t_segment`` more, every partial result that is merged ``t_merge``, every kernel
``t_launch``. Multiprocessors neither share bandwidth nor vary.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from manyheads.attention.lean.plan import Order, Plan, plan
from manyheads.attention.lean.schedule import flash_splits
from manyheads.errors import unknown_name

__all__ = ["Device", "Simulation", "simulate"]

Method = Literal["lean", "flash", "fa2"]
_METHODS = ("lean", "flash", "fa2")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Multiprocessors (108: A100, 132: H100, 304: MI300X), workers resident on each, and times.

    ``xcds``: chiplets that the multiprocessors stand on (MI300X: 8), among which lean attention
    divides heads; the other methods do not heed them.
    """

    sms: int = 108
    per_sm: int = 1
    t_tile: float = 1.0
    t_segment: float = 0.0
    t_merge: float = 0.0
    t_launch: float = 0.0
    xcds: int = 1

    def __post_init__(self) -> None:
        for name in ("sms", "per_sm", "xcds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.xcds > self.sms:
            raise ValueError(f"xcds {self.xcds} is above sms {self.sms}: they stand on them")
        if self.t_tile <= 0 or min(self.t_segment, self.t_merge, self.t_launch) < 0:
            raise ValueError("t_tile must be positive, and no time negative")

    @property
    def workers(self) -> int:
        return self.sms * self.per_sm


class Stretch(NamedTuple):
    """What a worker does from ``start`` to ``end``: "tiles", "wait" or "merge"."""

    start: float
    end: float
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """One kernel's run.

    Attributes:
        method: "lean", "flash" or "fa2".
        tiles: tiles computed.
        splits: pieces of an output tile: the same for all, or the most (lean).
        makespan: from launch to the last result.
        occupancy: time in tiles over workers x makespan.
        timeline: the stretches of each worker, in time.
    """

    method: str
    tiles: int
    splits: int
    makespan: float
    occupancy: float
    timeline: tuple[tuple[Stretch, ...], ...]


def simulate(
    lengths: Sequence[int] | Tensor,
    *,
    heads: int,
    method: Method = "lean",
    device: Device | None = None,
    tile: int = 128,
    order: Order = "head",
) -> Simulation:
    """Simulate decoding one token of each request on a device with many multiprocessors.

    Args:
        lengths: keys of each request.
        heads: key-value heads.
        method: "lean" (equal numbers of tiles, merged by hosts in the same kernel), "flash" (every
            context cut alike, by the longest; a second kernel merges) or "fa2" (not cut).
        device: by default 108 multiprocessors, a worker on each, no overheads.
        tile: keys a tile.
        order: of :func:`plan`.

    Raises:
        ValueError: an unknown method, or what :func:`plan` refuses.
    """
    if method not in _METHODS:
        raise unknown_name("method", method, _METHODS)
    device = device or Device()
    dealt = plan(
        lengths, heads=heads, workers=device.workers, tile=tile, order=order, xcds=device.xcds
    )
    if method == "lean":
        lines, splits = _lean(dealt, device), dealt.num_splits
    else:
        lines, splits = _fixed(dealt, device, "fixed" if method == "flash" else "none")
    makespan = max((line[-1].end for line in lines if line), default=0.0)
    busy = dealt.total * device.t_tile
    return Simulation(
        method=method,
        tiles=dealt.total,
        splits=splits,
        makespan=makespan,
        occupancy=busy / (device.workers * makespan) if makespan else 0.0,
        timeline=tuple(tuple(line) for line in lines),
    )


def _lean(dealt: Plan, device: Device) -> list[list[Stretch]]:
    lines: list[list[Stretch]] = [[] for _ in range(device.workers)]
    ready: dict[tuple[int, int], list[float]] = {}  # when the parts that a host waits for are there
    hosts: dict[tuple[int, int], int] = {}
    for s in dealt.segments:
        line = lines[s.worker]
        start = line[-1].end if line else device.t_launch
        end = start + (s.end - s.first) * device.t_tile + device.t_segment
        line.append(Stretch(start, end, "tiles"))
        output = (s.request, s.head)
        if s.host and not s.finishing:
            hosts[output] = s.worker
        elif not s.host:
            ready.setdefault(output, []).append(end)
    for output, worker in hosts.items():
        # What a host waits for is always the last of its own stretches, and the first of others'.
        line, own = lines[worker], lines[worker][-1].end
        last = max(ready[output])
        if last > own:
            line.append(Stretch(own, last, "wait"))
        begin = max(own, last)
        if device.t_merge:
            line.append(Stretch(begin, begin + len(ready[output]) * device.t_merge, "merge"))
    return lines


def _fixed(dealt: Plan, device: Device, rule: str) -> tuple[list[list[Stretch]], int]:
    tiles = [t[0] for t in dealt.tiles]
    longest = max(tiles, default=0)
    splits = flash_splits(len(tiles) * dealt.heads, longest, sms=device.sms, rule=rule)
    size = -(-longest // splits)
    lines: list[list[Stretch]] = [[] for _ in range(device.workers)]
    units = [
        max(0, min(size, n - i * size)) * device.t_tile + device.t_segment
        for n in tiles
        for _ in range(dealt.heads)
        for i in range(splits)
    ]
    end = _list_schedule(lines, units, device.t_launch, "tiles")
    if splits > 1:
        merges = [splits * device.t_merge] * (len(tiles) * dealt.heads)
        if device.t_merge or device.t_launch:
            _list_schedule(lines, merges, end + device.t_launch, "merge")
    return lines, splits


def _list_schedule(
    lines: list[list[Stretch]], units: list[float], start: float, what: str
) -> float:
    """Give each unit, in order, to the worker that is free first; return when all are done."""
    free = [(start, worker) for worker in range(len(lines))]
    end = start
    for unit in units:
        begin, worker = heapq.heappop(free)
        end = max(end, begin + unit)
        lines[worker].append(Stretch(begin, begin + unit, what))
        heapq.heappush(free, (begin + unit, worker))
    return end
