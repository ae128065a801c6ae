"""Absolute positions added to embeddings. B batch, N length, C dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["sinusoidal"]


def sinusoidal(positions: Tensor, dim: int, *, base: float = 10000.0) -> Tensor:
    """Return sines (first half) and cosines of positions (...): (..., C), float32 (1706.03762).

    Any position has a vector, so nothing bounds the length.
    """
    half = dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half, 1)
    angle = positions.float()[..., None] * torch.exp(-math.log(base) * exponent)
    parts = [angle.sin(), angle.cos()]
    if dim % 2:
        parts.append(torch.zeros_like(angle[..., :1]))
    return torch.cat(parts, -1)
