"""Landmark attention on whole, padded, packed and continued sequences.

B batch, H heads, N queries, M keys, D head dim, V value dim, L block with its landmark.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from manyheads.attention.landmark.definition import (
    BLOCK_SIZE,
    check_block_size,
    check_group_dropout,
    landmark_reference,
    regular_landmarks,
)
from manyheads.attention.landmark.fast import block_landmark
from manyheads.attention.landmark.groups import grouped_softmax
from manyheads.errors import unknown_name
from manyheads.layers.cache import append_tokens
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["LandmarkState", "landmark", "landmark_step", "landmark_update"]

Implementation = Literal["auto", "block", "rows", "dense"]
_IMPLEMENTATIONS = ("auto", "block", "rows", "dense")
_ROW_NUMBERS = 1 << 20  # scores made at once where landmarks stand at any places


class LandmarkState(NamedTuple):
    """A key-value cache with free places at its end.

    ``key`` (B, H_kv, capacity, D), ``value`` (B, H_kv, capacity, V), ``length`` (B,) tokens held
    in each row. Tokens are written in place: the state handed over is consumed.
    """

    key: Tensor
    value: Tensor
    length: Tensor


def landmark(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_landmark: Tensor | None = None,
    block_size: int = BLOCK_SIZE,
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group_dropout: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Landmark attention: a block is reached through the landmark at its end. Causal.

    Not softmax: needs training. The values of landmarks are never read, so that they have to be
    tokens of their own (:func:`insert_landmarks`). O(N M) time, no N x M matrix for regular blocks.

    Args:
        query: (B, H, N, D); the last N of the M keys.
        key: (B, H_kv, M, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, M, V).
        is_landmark: (B, M) bool, landmarks at any places (None: one at the end of every block).
        block_size: L, tokens a block with its landmark; what is left at the end is a block too.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real token, for N = M; padding takes no place in a block, and its
            outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1, for N = M; each begins
            with a new block.
        group_dropout: for training: earlier blocks are left out at random, each for each query and
            head with this probability, and the others' weights divided by what remains of 1; the
            own block stays. Drawn by torch's global generator. Runs as "rows".
        implementation: "block" (regular blocks by tiles, closed-form backward), "rows" (any
            places, some rows of the matrix at a time, made again in backward), "dense" (the
            definition), or "auto": "block" where landmarks are regular.

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, block_size is below 2, group_dropout lies outside [0, 1),
            or "block" or "dense" cannot do what is asked.

    Example:
        >>> q = k = v = torch.randn(1, 2, 100, 16)
        >>> landmark(q, k, v, block_size=10).shape
        torch.Size([1, 2, 100, 16])
    """
    check_qkv(query, key, value)
    batch, keys, queries = key.shape[0], key.shape[2], query.shape[2]
    mask = check_mask(mask, batch, keys)
    check_block_size(block_size)
    check_group_dropout(group_dropout)
    if group_dropout and implementation in ("block", "dense"):
        raise ValueError(
            f"group_dropout {group_dropout} with implementation={implementation!r}: pass 'rows' or "
            "'auto', which can leave blocks out"
        )
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if queries > keys:
        raise ValueError(f"query length {queries} is above key length {keys}: queries are the last")
    if queries != keys and (mask is not None or cu_seqlens is not None):
        raise ValueError(
            f"query length {queries} differs from key length {keys}: mask and cu_seqlens need one "
            "key for each query"
        )
    if is_landmark is not None and is_landmark.shape != (batch, keys):
        raise ValueError(
            f"is_landmark has shape {tuple(is_landmark.shape)}, expected (batch, length) = "
            f"({batch}, {keys})"
        )
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
        marks = None if is_landmark is None else is_landmark[:, None, :, None]
        (out,) = map_packed(
            lambda q, k, v, marked, m: landmark(
                q, k, v, is_landmark=None if marked is None else marked[:, 0, :, 0],
                block_size=block_size, scale=scale, mask=m, group_dropout=group_dropout,
                implementation=implementation,
            ),
            (query, key, value, marks),
            cu_seqlens,
        )  # fmt: skip
        return out
    moved = None if mask is None else compact(mask)
    q, k, v = query, key, value
    if moved is not None:
        # Real tokens moved to the front never see the padding behind them.
        q, k, v = (moved.gather(t, dim=2) for t in (q, k, v))
        is_landmark = None if is_landmark is None else moved.gather(is_landmark)
    form = "rows" if group_dropout else implementation
    out = _attend(q, k, v, is_landmark, block_size, scale, form, group_dropout)
    if moved is not None and mask is not None:
        out = moved.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype)


def landmark_update(
    state: LandmarkState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, LandmarkState]:
    """Append a block of tokens to a cache and attend causally to all that it holds.

    Exact, and the cache grows; :class:`LandmarkMemory` fetches the best blocks alone.

    Args:
        state: what an earlier call returned, or None at the start; consumed.
        query: (B, H, N, D); key, value: (B, H_kv, N, D and V).
        block_size, scale: as in :func:`landmark`; a landmark ends every block of a row.
        mask: (B, N), True = a real token; padded tokens take no place in the cache.

    Returns:
        The output (B, H, N, V) and the next state.
    """
    check_qkv(query, key, value, same_length=True)
    check_block_size(block_size)
    batch, _, length, _ = query.shape
    mask = check_mask(mask, batch, length)
    moved = None if mask is None else compact(mask)
    q, k, v = query, key, value
    if moved is not None:
        q, k, v = (moved.gather(t, dim=2) for t in (q, k, v))
    counts = k.new_full((batch,), length, dtype=torch.long) if mask is None else mask.sum(1)
    if state is None:
        state = LandmarkState(k[:, :, :0], v[:, :, :0], counts.new_zeros(batch))
    keys, values = append_tokens(state.key, state.value, state.length, k, v)
    parts = []
    for start, rows in _by_value(state.length):
        inputs = (q[rows], keys[rows, :, : start + length], values[rows, :, : start + length])
        parts.append((rows, _attend(*inputs, None, block_size, scale, "block")))
    if len(parts) == 1:
        out = parts[0][1]
    else:
        order = torch.cat([rows for rows, _ in parts]).argsort()
        out = torch.cat([part for _, part in parts])[order]
    if moved is not None and mask is not None:
        out = moved.scatter(out, dim=2).masked_fill(~mask[:, None, :, None], 0)
    return out.to(query.dtype), LandmarkState(keys, values, state.length + counts)


def landmark_step(
    state: LandmarkState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = BLOCK_SIZE,
    scale: float | None = None,
) -> tuple[Tensor, LandmarkState]:
    """Add one token in time proportional to the context; the cache grows.

    Args:
        state: the cache; consumed.
        query: (B, H, D); key, value: (B, H_kv, D and V).

    Returns:
        The output (B, H, V) and the next state.
    """
    new = (t[:, :, None] for t in (query, key, value))
    out, state = landmark_update(state, *new, block_size=block_size, scale=scale)
    return out[:, :, 0], state


def _by_value(lengths: Tensor) -> list[tuple[int, Tensor]]:
    """Return each length that occurs, with the rows that have it."""
    return [(n, (lengths == n).nonzero()[:, 0]) for n in lengths.unique().tolist()]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_landmark: Tensor | None,
    block_size: int,
    scale: float | None,
    implementation: Implementation,
    group_dropout: float = 0.0,
) -> Tensor:
    heads, keys = query.shape[1], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(work), repeat_kv(key, heads).to(work), repeat_kv(value, heads).to(work)
    if is_landmark is not None and implementation in ("auto", "block"):
        regular = _is_regular(is_landmark, block_size)
        if not regular and implementation == "block":
            raise ValueError(
                f"is_landmark does not end every block of block_size {block_size}: pass "
                "implementation='rows', or the block_size that it has"
            )
        is_landmark = None if regular else is_landmark
    if is_landmark is None and implementation in ("auto", "block"):
        return block_landmark(q, k, v, block_size=block_size, scale=scale)
    if is_landmark is None:
        marks = regular_landmarks(keys, block_size, device=key.device)
        is_landmark = marks.expand(key.shape[0], -1)
    with torch.autocast(q.device.type, enabled=False):
        if implementation == "dense":
            return landmark_reference(q, k, v, is_landmark=is_landmark, scale=scale)
        return _by_rows(q, k, v, is_landmark, scale, group_dropout)


def _is_regular(is_landmark: Tensor, block_size: int) -> bool:
    # Whether they are is a question to the numbers, which a compiled graph cannot ask.
    if torch.compiler.is_compiling():
        return False
    marks = regular_landmarks(is_landmark.shape[1], block_size, device=is_landmark.device)
    return bool((is_landmark.bool() == marks).all())


def _by_rows(
    q: Tensor, k: Tensor, v: Tensor, is_landmark: Tensor, scale: float, group_dropout: float
) -> Tensor:
    batch, heads, queries, _ = q.shape
    before = k.shape[2] - queries
    size = max(1, _ROW_NUMBERS // max(1, batch * heads * k.shape[2]))

    def rows(q: Tensor, k: Tensor, v: Tensor, marks: Tensor) -> Tensor:
        return grouped_softmax(q @ k.mT * scale, marks, group_dropout=group_dropout) @ v

    parts = []
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        end = before + stop
        inputs = (q[:, :, start:stop], k[:, :, :end], v[:, :, :end], is_landmark[:, :end])
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            parts.append(checkpoint(rows, *inputs, use_reentrant=False))
        else:
            parts.append(rows(*inputs))
    return torch.cat(parts, 2) if parts else q.new_zeros(batch, heads, 0, v.shape[-1])
