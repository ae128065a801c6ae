"""Dealing the tiles of a ragged batch to workers: whole numbers only.

A context of n keys is ceil(n / tile) tiles. All tiles of all heads and requests stand in one
line, which is cut into as many pieces as there are workers, no two of which differ by more than
one tile. A worker may thus span several heads and requests, and a head several workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from torch import Tensor

from manyheads.attention.lean.schedule import ceil_div
from manyheads.errors import unknown_name

__all__ = ["ORDERS", "Order", "Plan", "Run", "Segment", "deal", "plan"]

Order = Literal["head", "request"]
ORDERS = ("head", "request")


class Segment(NamedTuple):
    """What one worker reads of one output tile.

    ``worker``; the output tile (``head``, ``request``, ``block`` of queries); tiles ``first`` to
    ``end`` (exclusive) of its context; ``host``: it has the first tile, and merges the others;
    ``finishing``: it has the last.
    """

    worker: int
    head: int
    request: int
    block: int
    first: int
    end: int
    host: bool
    finishing: bool


class Run(NamedTuple):
    """Segments of one worker that differ in the head alone: ``heads`` from ``segment``'s on."""

    segment: Segment
    heads: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which worker reads which tiles; made by :func:`plan`.

    Attributes:
        tiles: tiles of each block of queries of each request.
        heads: key-value heads.
        tile: keys a tile.
        queries, query_tile: query tokens a request, and how many of them a block has.
        is_causal: whether query i sees the keys up to its own place alone.
        order: what varies slowest along the line of tiles.
        workers: workers that have something to do.
        xcds: chiplets among which heads and workers are divided.
        borders: worker p has the tiles borders[p] to borders[p + 1] of the line.
        segments: what they read, in the order of the line.
        runs: for each worker its segments, those that one product can compute taken together.
    """

    tiles: tuple[tuple[int, ...], ...]
    heads: int
    tile: int
    queries: int
    query_tile: int
    is_causal: bool
    order: Order
    workers: int
    xcds: int
    borders: tuple[int, ...]
    segments: tuple[Segment, ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def total(self) -> int:
        """Tiles of all output tiles."""
        return self.borders[-1]

    @property
    def loads(self) -> tuple[int, ...]:
        """Tiles of each worker: of one chiplet's the largest comes first, and is at most one above
        the smallest."""
        return tuple(b - a for a, b in zip(self.borders, self.borders[1:], strict=False))

    @property
    def high_load(self) -> int:
        """Workers with the larger number of tiles."""
        return self.loads.count(max(self.loads, default=0))

    @property
    def num_splits(self) -> int:
        """The most pieces that one output tile is cut into."""
        counts: dict[tuple[int, int, int], int] = {}
        for s in self.segments:
            key = (s.request, s.head, s.block)
            counts[key] = counts.get(key, 0) + 1
        return max(counts.values(), default=0)

    @property
    def balance(self) -> float:
        """Mean load over largest load: the share of time that workers are busy."""
        return self.total / (self.workers * max(self.loads)) if self.total else 1.0

    def fits(self, lengths: Sequence[int] | Tensor) -> bool:
        """Return whether contexts of these lengths have the same tiles: it can be used again."""
        rows = _read(lengths)
        counted = _count(rows, self.tile, self.queries, self.query_tile, self.is_causal)
        return counted == self.tiles


def plan(
    lengths: Sequence[int] | Tensor,
    *,
    heads: int,
    workers: int,
    tile: int = 256,
    order: Order = "head",
    queries: int = 1,
    query_tile: int = 64,
    is_causal: bool = False,
    xcds: int = 1,
) -> Plan:
    """Deal the tiles of a batch of contexts to workers, evenly, whatever the lengths.

    Plans are remembered: while the lengths grow inside the same tiles, the same one comes back.

    Args:
        lengths: keys of each request; an empty one has no tile.
        heads: key-value heads; the query heads of one are rows of one product.
        workers: any number; no more are used than there are tiles.
        tile: keys a tile.
        order: "head" (head, request, block, tile: a head's tiles of all requests lie together) or
            "request" (request, head, block, tile).
        queries: query tokens of a request, its last ones if ``is_causal``.
        query_tile: query tokens a block.
        is_causal: a block of queries has no tile behind its last token; short and long blocks
            alternate.
        xcds: chiplets with caches of their own (8 in an MI300X). Each takes an equal share of the
            heads, neighbouring ones, and of the workers, and deals on its own, so that no context
            is read, and no result merged, across two. Heads that do not divide cost balance.

    Raises:
        ValueError: a number that is not positive, fewer workers than chiplets, a negative length,
            an unknown order.
    """
    for name, value in (
        ("heads", heads), ("workers", workers), ("tile", tile), ("queries", queries),
        ("query_tile", query_tile), ("xcds", xcds),
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if workers < xcds:
        raise ValueError(f"workers {workers} is below xcds {xcds}: each chiplet needs one")
    if order not in ORDERS:
        raise unknown_name("order", order, ORDERS)
    rows = _read(lengths)
    if any(n < 0 for n in rows):
        raise ValueError(f"lengths {list(rows)} hold a negative one: an empty context has 0 keys")
    tiles = _count(rows, tile, queries, query_tile, is_causal)
    return _plan(tiles, heads, workers, tile, order, queries, query_tile, is_causal, xcds)


def deal(total: int, workers: int) -> tuple[int, ...]:
    """Cut ``total`` tiles into ``workers`` pieces, larger ones first: the borders."""
    workers = min(workers, total)
    if workers == 0:
        return (0,)
    small, larger = divmod(total, workers)
    return tuple(p * small + min(p, larger) for p in range(workers + 1))


def _read(lengths: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(lengths.tolist() if isinstance(lengths, Tensor) else lengths)


def _count(
    lengths: tuple[int, ...], tile: int, queries: int, query_tile: int, is_causal: bool
) -> tuple[tuple[int, ...], ...]:
    ends = [min(a + query_tile, queries) for a in range(0, queries, query_tile)]
    if not is_causal:
        return tuple((ceil_div(n, tile),) * len(ends) for n in lengths)
    return tuple(tuple(ceil_div(max(n - queries + end, 0), tile) for end in ends) for n in lengths)


def _blocks(number: int, is_causal: bool) -> list[int]:
    """Order the blocks of queries; a causal one pairs a short with a long: 0, last, 1, ..."""
    if not is_causal:
        return list(range(number))
    return [i // 2 if i % 2 == 0 else number - 1 - i // 2 for i in range(number)]


@lru_cache(maxsize=64)
def _plan(
    tiles: tuple[tuple[int, ...], ...],
    heads: int,
    workers: int,
    tile: int,
    order: Order,
    queries: int,
    query_tile: int,
    is_causal: bool,
    xcds: int,
) -> Plan:
    shares = _shares(heads, workers, xcds)
    line, each = [0], sum(map(sum, tiles))
    for own, team in shares:
        line += [line[-1] + border for border in deal(len(own) * each, team)[1:]]
    borders = tuple(line)
    tour = (place for own, _ in shares for place in _tour(own, len(tiles), order))
    segments, worker, begin = [], 0, 0
    for head, request in tour:
        for block in _blocks(len(tiles[request]), is_causal):
            end = begin + tiles[request][block]
            place = begin
            while place < end:
                stop = min(end, borders[worker + 1])
                segments.append(
                    Segment(
                        worker=worker,
                        head=head,
                        request=request,
                        block=block,
                        first=place - begin,
                        end=stop - begin,
                        host=place == begin,
                        finishing=stop == end,
                    )
                )
                worker += stop == borders[worker + 1]
                place = stop
            begin = end
    return Plan(
        tiles=tiles,
        heads=heads,
        tile=tile,
        queries=queries,
        query_tile=query_tile,
        is_causal=is_causal,
        order=order,
        workers=len(borders) - 1,
        xcds=xcds,
        borders=borders,
        segments=tuple(segments),
        runs=_runs(segments, len(borders) - 1),
    )


def _runs(segments: Sequence[Segment], workers: int) -> tuple[tuple[Run, ...], ...]:
    found: list[list[Run]] = [[] for _ in range(workers)]
    for s in segments:
        own = found[s.worker]
        if own:
            last, heads = own[-1]
            if s[2:6] == last[2:6] and s.head == last.head + heads:
                own[-1] = Run(last, heads + 1)
                continue
        own.append(Run(s, 1))
    return tuple(map(tuple, found))


def _shares(heads: int, workers: int, xcds: int) -> list[tuple[range, int]]:
    """Return the heads of each chiplet that has any, and the number of its workers."""
    head, worker = deal(heads, xcds), deal(workers, xcds)
    return [(range(head[i], head[i + 1]), worker[i + 1] - worker[i]) for i in range(len(head) - 1)]


def _tour(heads: range, requests: int, order: Order) -> Iterator[tuple[int, int]]:
    if order == "head":
        return ((h, b) for h in heads for b in range(requests))
    return ((h, b) for b in range(requests) for h in heads)
