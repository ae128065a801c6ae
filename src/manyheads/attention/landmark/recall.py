"""Attention of a chunk to itself and to blocks out of a memory.

B batch, H heads, T new tokens, k fetched blocks, L block with its landmark, D and V head dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.landmark.fast import block_landmark_total
from manyheads.attention.landmark.memory import LandmarkMemory
from manyheads.attention.landmark.native import can_decode, decode
from manyheads.layers.heads import check_qkv, repeat_kv

__all__ = ["attend_with_memory"]

_FETCHED_NUMBERS = 1 << 23  # keys and values gathered at once


@torch.no_grad()
def attend_with_memory(memory: LandmarkMemory, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with the next tokens of a stream, then put them into the memory. Lossy: k blocks.

    The tokens see themselves causally, the unfinished block before them, and the best blocks of
    the memory, in one grouped softmax. Nothing is differentiated.

    Args:
        memory: holds what came before; changed.
        query: (B, H, T, D); key, value: (B, H_kv, T, D and V), all before the rotary embedding.

    Returns:
        (B, H, T, V) in the dtype of ``query``.
    """
    check_qkv(query, key, value, same_length=True)
    heads, scale = query.shape[1], query.shape[-1] ** -0.5
    work = torch.promote_types(query.dtype, torch.float32)
    if work == torch.float32 and can_decode(memory, query):
        out = decode(memory, *(t.to(work) for t in (query, key, value)))
        memory.append(key, value)
        return out.to(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        q, keys = memory.turn_chunk(query.to(work), key.to(work), relative=True)
        values = value.to(work)
        if memory.tail is not None:
            values = torch.cat((memory.tail[1].to(values), values), 2)
        keys, values = repeat_kv(keys, heads), repeat_kv(values, heads)
        if q.shape[2] == 1:
            out, total = _own_block(q * scale, keys, values, memory.block_size)
        else:
            out, total = block_landmark_total(
                q, keys, values, block_size=memory.block_size, scale=scale
            )
        if memory.stored:
            far, weight = _far(memory, query.to(work))
            # Two parts of one softmax, each with the logarithm of its sum.
            near = torch.sigmoid(total - weight)[..., None]
            out = near * out + (1 - near) * far
    memory.append(key, value)
    return out.to(query.dtype)


def _own_block(q: Tensor, keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Attend with one token to its own block alone; its landmark does not see itself."""
    if keys.shape[2] == size:
        keys, values = keys[:, :, :-1], values[:, :, :-1]
    scores = q @ keys.mT
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def _far(memory: LandmarkMemory, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the fetched blocks give, (B, H, T, V), and the logarithm of their sum."""
    chosen = memory.select(query)
    shared = chosen.shape[2] == 1
    batch, heads, length, dim = query.shape
    each = batch * heads * chosen.shape[3] * memory.block_size * 2 * dim
    size = length if shared else max(1, _FETCHED_NUMBERS // each)
    outs, totals = [], []
    for start in range(0, length, size):
        rows = slice(start, start + size)
        block = chosen if shared else chosen[:, :, rows]
        found = memory.fetch(query[:, :, rows], block, offset=start)
        inner = found.scores[..., :-1].softmax(-1)  # (B, H, T, k, L - 1)
        gates = found.scores[..., -1]
        weights = inner * gates.softmax(-1)[..., None]
        values = found.values[..., :-1, :].to(weights).flatten(3, 4)  # (B, H, T or 1, k (L-1), V)
        weights = weights.flatten(3)
        if shared:
            outs.append(weights @ values[:, :, 0])
        else:
            outs.append((weights[..., None, :] @ values).squeeze(3))
        totals.append(gates.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(totals, 2)
