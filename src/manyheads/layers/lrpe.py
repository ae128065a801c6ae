"""LRPE, linearised relative position encoding (Qin et al., 2210.10340): turn queries and keys.

B batch, H heads, N length, D head dim.

x -> R(t θ) (I - 2 v vᵀ) x with a fixed unit vector v and learned angles θ: the product of a query
at t and a key at s then depends on t - s alone, and may be summed before the query is known.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.layers.rotary import apply_rotary

__all__ = ["LRPE"]


class LRPE(nn.Module):
    """A Householder reflection, then a rotation of the channel pairs (2i, 2i + 1) by t θ_i.

    All heads share the angles and the reflection. An odd D leaves the last channel unturned.

    Args:
        head_dim: D.
        learned: whether θ (1, 1, D // 2) is a parameter; else it stays 10000^(-2i / D), D
            the channels that are turned.
        householder: whether to reflect first, by a unit vector ``v`` (D) that is drawn once,
            stored as a parameter and never trained.
    """

    def __init__(self, head_dim: int, *, learned: bool = True, householder: bool = True) -> None:
        super().__init__()
        if head_dim < 2:
            raise ValueError(f"head_dim {head_dim} must be at least 2: there is no pair to turn")
        self.head_dim, self.learned = head_dim, learned
        self.theta = nn.Parameter(self._start(None)[None, None]) if learned else None
        self.v = None
        if householder:
            v = torch.randn(head_dim)
            self.v = nn.Parameter(v / torch.linalg.vector_norm(v), requires_grad=False)

    def _start(self, device: torch.device | None) -> Tensor:
        pairs = self.head_dim // 2
        turned = self.head_dim if self.learned else 2 * pairs
        index = torch.arange(pairs, device=device, dtype=torch.float32)
        return 10000.0 ** (-2 / turned * index)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin (..., N, D // 2), in float32 at least, of positions (..., N)."""
        if self.theta is None:
            theta = self._start(positions.device)
        else:
            theta = self.theta.flatten()
            theta = theta.to(torch.promote_types(theta.dtype, torch.float32))
        angle = positions.to(theta.dtype)[..., None] * theta
        return angle.cos(), angle.sin()

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the reflection and the rotation of :meth:`angles` to ``x`` (B, H, N, D)."""
        if self.v is not None:
            v = self.v.to(x.dtype)
            x = torch.addcmul(x, (x @ v)[..., None], v, value=-2)
        if self.head_dim % 2:
            turned = apply_rotary(x[..., :-1], cos, sin, interleaved=True)
            return torch.cat((turned, x[..., -1:]), -1)
        return apply_rotary(x, cos, sin, interleaved=True)

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Turn queries and keys (B, H, N, D) at integer positions, (N,) or (B, N)."""
        cos, sin = self.angles(positions)
        return self.turn(query, cos, sin), self.turn(key, cos, sin)
