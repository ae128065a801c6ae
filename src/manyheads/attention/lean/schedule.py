"""How many workers, and how many pieces: the rules of two schedulers, and FlashDecoding's.

All count in tiles. ``T`` is the number of tiles of all output tiles together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from manyheads.errors import unknown_name

__all__ = [
    "Schedule",
    "aiter_schedule",
    "ceil_div",
    "flash_splits",
    "onnxruntime_schedule",
    "tile_keys",
]

_QUERY_ROWS = 64  # rows of one output tile in onnxruntime
_MOST_SPLITS = 128


class Schedule(NamedTuple):
    """Numbers that describe a deal of tiles to workers.

    ``workers``; ``largest`` tiles that one of them gets; ``high_load`` workers that get so many
    (the rest get one fewer); ``num_splits``, a bound on the pieces of an output tile; ``is_even``:
    all get the same.
    """

    workers: int
    largest: int
    high_load: int
    num_splits: int
    is_even: bool


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def tile_keys(head_dim: int) -> int:
    """Return onnxruntime's keys a tile: 256 up to a head dim of 64, 128 up to 128, 64 above."""
    return 256 if head_dim <= 64 else 128 if head_dim <= 128 else 64


def schedule(total: int, blocks: int, workers: int) -> Schedule:
    """Describe the deal of ``total`` tiles, ``blocks`` an output tile, to ``workers``."""
    workers = max(1, min(workers, total))
    largest = ceil_div(total, workers)
    is_even = total % workers == 0
    if largest == 0:
        return Schedule(workers, 0, workers, 1, True)
    if is_even:
        splits = 1 + (blocks + largest - 2) // largest
    else:
        splits = 1 + (blocks + largest - 3) // (largest - 1)
    return Schedule(workers, largest, total - (largest - 1) * workers, splits, is_even)


def aiter_schedule(
    lengths: Sequence[int], *, heads: int, workers: int, tile: int = 64, query_blocks: int = 1
) -> Schedule:
    """Return the deal of aiter's scheduler, which counts query heads and real lengths.

    Args:
        lengths: keys of each request.
        heads: query heads.
        workers: at hand; fewer are used if each would get less than two tiles.
        tile: keys a tile.
        query_blocks: blocks of queries of each head.
    """
    blocks = sum(ceil_div(n, tile) for n in lengths)
    total = heads * blocks * query_blocks
    used = _two_each(total, blocks) if total <= workers else workers
    return schedule(total, blocks, used)


def onnxruntime_schedule(
    *, sms: int, batch: int, heads: int, kv_heads: int, head_dim: int, context: int
) -> Schedule:
    """Return the deal of onnxruntime for decoding one token of each of ``batch`` requests.

    Two workers a multiprocessor; the longest ``context`` stands for all. The query heads of a
    key-value head are the rows of its output tiles.

    Raises:
        ValueError: ``heads`` is no multiple of ``kv_heads``.
    """
    if heads % kv_heads:
        raise ValueError(f"heads {heads} is not a multiple of kv_heads {kv_heads}")
    blocks = ceil_div(context, tile_keys(head_dim))
    rows = ceil_div(heads // kv_heads, _QUERY_ROWS)
    total = batch * kv_heads * rows * blocks
    at_hand = 2 * sms
    if total <= 2 * at_hand:
        used = _two_each(total, blocks)
    else:
        used = min(at_hand, 32 * kv_heads * batch * rows)
    return schedule(total, blocks, used)


def _two_each(total: int, blocks: int) -> int:
    return min((total + 1) // 2, ceil_div(32 * total, max(blocks, 1)))


def flash_splits(units: int, blocks: int, *, sms: int, rule: str = "fixed") -> int:
    """Return into how many equal pieces FlashDecoding cuts every context.

    Args:
        units: output tiles: requests x key-value heads x blocks of queries.
        blocks: tiles of the longest context.
        sms: multiprocessors.
        rule: "fixed" (FlashDecoding: the least number that fills the last wave to 85 % of the
            best) or "none" (FlashAttention-2: 1).
    """
    if rule not in ("fixed", "none"):
        raise unknown_name("rule", rule, ("fixed", "none"))
    if rule == "none" or units >= 0.8 * sms:
        return 1
    shares: dict[int, float] = {}
    for splits in range(1, min(_MOST_SPLITS, sms, blocks) + 1):
        if splits > 1 and ceil_div(blocks, splits) == ceil_div(blocks, splits - 1):
            continue
        waves = units * splits / sms
        shares[splits] = waves / ceil_div(units * splits, sms)
    best = max(shares.values(), default=0.0)
    return next((s for s, share in shares.items() if share >= 0.85 * best), 1)
