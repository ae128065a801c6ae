"""Block-local attention on whole, padded, packed and continued sequences.

B batch, H heads, N length, D head dim, V value dim, C block.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.diag.definition import Kind, check_kind
from manyheads.attention.diag.fast import diag_blocks, diag_plain
from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, compact, map_packed

__all__ = ["DiagState", "diag", "diag_step", "diag_update"]

Implementation = Literal["auto", "blocked", "plain"]
_IMPLEMENTATIONS = ("auto", "blocked", "plain")


class DiagState(NamedTuple):
    """The keys and values of the block that is being filled; empty again at each border.

    ``key`` (B, H_kv, C, D), ``value`` (B, H_kv, C, V), zeros in the free places; ``length`` (B,)
    tokens read so far, of which ``length % C`` are held.
    """

    key: Tensor
    value: Tensor
    length: Tensor


def diag(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    block_size: int = 64,
    kind: Kind = "softmax",
    scale: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    pad_keys: bool = False,
    mask_after_softmax: bool = False,
    dropout_p: float = 0.0,
    implementation: Implementation = "auto",
) -> Tensor:
    """Attention inside blocks of C tokens that do not overlap (DiagAttention). Local; O(N C).

    A token sees nothing outside its own block. Blocks are counted from the first real token.

    Args:
        query: (B, H, N, D).
        key: (B, H_kv, N, D); each key head serves H / H_kv consecutive query heads.
        value: (B, H_kv, N, V).
        is_causal: within a block, token i sees tokens up to i.
        block_size: C.
        kind: "softmax", or "relu": relu(scores) as they are, to be normalised by the caller.
        scale: factor on the scores, D ** -0.5 unless given.
        mask: (B, N), True = a real token; blocks are cut as if padded tokens were absent, and
            their outputs are 0.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; blocks start afresh.
        pad_keys: the last block is filled up with zero keys and values, which take part in a
            bidirectional softmax (each adds exp(0) to the denominator), as in the official code.
        mask_after_softmax: remove the future from the weights instead of the scores, as one of
            the official codes does. The denominator then sees the future: NOT causal.
        dropout_p: dropout on the weights, always applied if positive.
        implementation: "blocked" (cache-sized segments, closed-form backward), "plain" (all
            blocks at once under autograd; the one with dropout), or "auto".

    Returns:
        (B, H, N, V) in the dtype of ``query``.

    Raises:
        ValueError: shapes do not fit, an unknown kind or implementation, dropout with "blocked".

    Example:
        >>> q = k = v = torch.randn(1, 2, 100, 16)
        >>> diag(q, k, v, is_causal=True, block_size=32).shape
        torch.Size([1, 2, 100, 16])
    """
    check_qkv(query, key, value, same_length=True)
    check_kind(kind, block_size)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)
    if dropout_p and implementation == "blocked":
        raise ValueError(f"dropout_p {dropout_p} needs implementation='plain' (or 'auto')")
    late = is_causal and mask_after_softmax
    pad_keys = pad_keys and kind == "softmax" and (late or not is_causal)
    if not pad_keys:
        block_size = max(1, min(block_size, length))
    options: dict[str, Any] = {
        "scale": dim**-0.5 if scale is None else scale,
        "block_size": block_size,
        "is_causal": is_causal,
        "kind": kind,
        "mask_late": late,
    }
    plain = implementation == "plain" or dropout_p > 0

    def run(q: Tensor, k: Tensor, v: Tensor, row_mask: Tensor | None) -> Tensor:
        if row_mask is None:
            moved = counts = None
        else:
            moved = compact(row_mask)
            front = moved.front[:, None, :, None]
            q, k, v = (moved.gather(t, dim=2).masked_fill(~front, 0) for t in (q, k, v))
            counts = row_mask.sum(1)
        if pad_keys:
            filled = q.new_full((q.shape[0],), q.shape[2], dtype=torch.long)
            filled = filled if counts is None else counts
            counts = (filled + block_size - 1) // block_size * block_size
        if plain:
            out = diag_plain(q, k, v, counts, dropout_p=dropout_p, **options)
        else:
            out = diag_blocks(q, k, v, counts, **options)
        if moved is None or row_mask is None:
            return out
        return moved.scatter(out, dim=2).masked_fill(~row_mask[:, None, :, None], 0)

    work = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (t.to(work) for t in (query, key, value))
    k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    if cu_seqlens is None:
        return run(q, k, v, mask).to(query.dtype)
    if mask is not None:
        raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
    (out,) = map_packed(run, (q, k, v), cu_seqlens)
    return out.to(query.dtype)


def diag_update(
    state: DiagState | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    kind: Kind = "softmax",
    scale: float | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, DiagState]:
    """Continue causally with a block of tokens; arguments as :func:`diag`.

    Args:
        state: what an earlier call returned, or None at the start; not changed.

    Returns:
        The output (B, H, N, V) and the next state.

    Raises:
        ValueError: shapes do not fit, or the state was made with another block size.
    """
    check_qkv(query, key, value, same_length=True)
    check_kind(kind, block_size)
    batch, heads, length, dim = query.shape
    mask = check_mask(mask, batch, length)
    held = 0
    before = torch.zeros(batch, dtype=torch.long, device=query.device)
    if state is not None:
        # The tokens held stand in front again, so that every row's blocks begin at its place 0.
        _check_state(state, block_size)
        before, held = state.length, block_size
        taken = torch.arange(block_size, device=query.device) < (before % block_size)[:, None]
        new = taken.new_ones(batch, length) if mask is None else mask
        mask = torch.cat((taken, new), 1)
        query = torch.cat((query.new_zeros(batch, heads, held, dim), query), 2)
        key = torch.cat((state.key.to(key), key), 2)
        value = torch.cat((state.value.to(value), value), 2)
    out = diag(
        query,
        key,
        value,
        is_causal=True,
        block_size=block_size,
        kind=kind,
        scale=scale,
        mask=mask,
        dropout_p=dropout_p,
    )
    if mask is None:
        counts = before + length
    else:
        moved = compact(mask)
        key, value = moved.gather(key, dim=2), moved.gather(value, dim=2)
        counts = mask.sum(1)
    start, rest = counts - counts % block_size, counts % block_size
    places = torch.arange(block_size, device=query.device)
    index = (start[:, None] + places).clamp_max(max(key.shape[2] - 1, 0))
    free = (places >= rest[:, None])[:, None, :, None]
    keys, values = (
        t.new_zeros(batch, t.shape[1], block_size, t.shape[3])
        if t.shape[2] == 0
        else _pick(t, index).masked_fill(free, 0)
        for t in (key, value)
    )
    total = before - before % block_size + counts if state is not None else counts
    return out[:, :, held:], DiagState(keys, values, total)


def diag_step(
    state: DiagState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_size: int = 64,
    kind: Kind = "softmax",
    scale: float | None = None,
) -> tuple[Tensor, DiagState]:
    """Add one token in O(H C (D + V)) time and constant memory.

    Args:
        state: the state so far; not changed.
        query: (B, H, D); key, value: (B, H_kv, D and V).
        block_size, kind, scale: as in :func:`diag`.

    Returns:
        The output (B, H, V) and the next state.

    Raises:
        ValueError: an unknown kind, or the state was made with another block size.
    """
    check_kind(kind, block_size)
    _check_state(state, block_size)
    heads = query.shape[1]
    slot = (state.length % block_size)[:, None]
    places = torch.arange(block_size, device=query.device)
    here = (places == slot)[:, None, :, None]
    keys = torch.where(here, key[:, :, None].to(state.key), state.key)
    values = torch.where(here, value[:, :, None].to(state.value), state.value)
    work = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    k, v = (repeat_kv(t.to(work), heads) for t in (keys, values))
    scores = (query.to(work)[:, :, None] * scale) @ k.mT  # (B, H, 1, C)
    if kind == "relu":
        weights = scores.relu()
    else:
        weights = scores.masked_fill((places > slot)[:, None, None], -torch.inf).softmax(-1)
    out = (weights @ v).squeeze(2).to(query.dtype)
    full = (slot == block_size - 1)[..., None, None]
    length = state.length + 1
    return out, DiagState(keys.masked_fill(full, 0), values.masked_fill(full, 0), length)


def _check_state(state: DiagState, block_size: int) -> None:
    if state.key.shape[2] != block_size:
        raise ValueError(
            f"the state holds blocks of {state.key.shape[2]} tokens, the call says "
            f"block_size={block_size}: pass the same block_size to every call"
        )


def _pick(t: Tensor, index: Tensor) -> Tensor:
    """Gather tokens (B, C) of (B, H, N, D)."""
    return t.gather(2, index[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
