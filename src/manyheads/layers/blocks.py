"""Sequences cut into blocks. B batch, H heads, N length, D head dim."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["block_count", "cut", "lengths_as_counts"]


def block_count(length: int, block: int) -> int:
    """Return how many blocks hold ``length`` tokens."""
    return -(-length // block)


def cut(x: Tensor, block: int) -> Tensor:
    """Cut (B, H, N, D) into (B, H, blocks, block, D), the last one filled up with zeros."""
    missing = -x.shape[2] % block
    whole = F.pad(x, (0, 0, 0, missing)) if missing else x
    return whole.unflatten(2, (whole.shape[2] // block, block))


def lengths_as_counts(lengths: Tensor | None, length: int, block: int, like: Tensor) -> Tensor:
    """Return the real tokens of each block, (1 or B, blocks)."""
    total = like.new_full((1,), length, dtype=torch.long) if lengths is None else lengths
    starts = torch.arange(block_count(length, block), device=like.device) * block
    return (total[:, None] - starts).clamp(0, block)
