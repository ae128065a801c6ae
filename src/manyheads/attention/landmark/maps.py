"""Which blocks of a stream queries fetch from a memory, as a block mask.

B batch, H heads, T new tokens, S stored blocks, k fetched blocks, L block with its landmark.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.block_sparse import BlockMask, create_block_mask
from manyheads.attention.landmark.memory import LandmarkMemory

__all__ = ["landmark_block_mask"]


def landmark_block_mask(memory: LandmarkMemory, query: Tensor) -> BlockMask:
    """Return the keys that the next tokens' queries meet at all: fetched blocks, and what is near.

    The grouped softmax over these pairs is what :func:`attend_with_memory` gives where there are
    no rotary positions. It is no softmax over them: ``block_sparse`` on the mask gives what softmax
    attention to the fetched blocks would, which differs.

    Args:
        memory: what came before.
        query: (B, H, T, D), before the rotary embedding.

    Returns:
        A mask over T queries, a block each, and S · L + tail + T keys in blocks of L: those that
        the memory holds, oldest first, and the new ones.

    Example:
        >>> memory = LandmarkMemory(block_size=5, top_k=1, rotary_theta=None)
        >>> memory.append(torch.ones(1, 1, 22, 4), torch.ones(1, 1, 22, 4))
        >>> print(landmark_block_mask(memory, torch.ones(1, 1, 3, 4)))
        ···█▒
        ···█▒
        ···██
    """
    batch, heads, length, _ = query.shape
    size, stored, tail = memory.block_size, memory.stored, memory.tail_length
    old = stored * size
    fetched = torch.zeros(batch, heads, length, stored, dtype=torch.bool, device=query.device)
    if stored:
        chosen = memory.select(query) - (memory.seen - stored)
        fetched.scatter_(3, chosen.expand(-1, -1, length, -1), True)

    def met(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        near = (kv_idx >= old) & (kv_idx - old <= tail + q_idx)
        if not stored:
            return near
        far = fetched[b, h, q_idx, (kv_idx // size).clamp_max(stored - 1)]
        return near | (far & (kv_idx < old))

    keys = old + tail + length
    return create_block_mask(met, batch, heads, length, keys, (1, size), device=query.device)
