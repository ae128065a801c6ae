"""Rotary position embedding (Su et al., 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary_angles"]


def rotary_angles(
    positions: Tensor, head_dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (..., N, head_dim / 2), in float32, for integer or real positions.

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: rotary embedding turns pairs of channels")
    frequency = theta ** (
        -torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    angle = positions.float()[..., None] * frequency
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the channel pairs of ``x`` (B, H, N, D) by the angles (N, D/2) or (B, N, D/2).

    Pairs are (i, i + D/2), as in LLaMA; with ``interleaved`` (2i, 2i + 1), as in GPT-J.
    """
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
