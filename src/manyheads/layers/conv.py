"""Short depthwise causal convolutions, with the last inputs as their state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manyheads.layers.conv_op import short_conv
from manyheads.layers.ragged import compact

__all__ = ["ShortConv"]


class ShortConv(nn.Module):
    """Depthwise causal convolution over the length, then SiLU.

    y_t = silu(Σ_j w_j x_{t-W+1+j}) for each channel; W is ``kernel_size``. The state is the last
    M inputs of each row, (B, M, C), zeros at the start; M is ``memory``, W - 1 unless given
    (some published caches hold W).
    """

    def __init__(
        self, dim: int, kernel_size: int = 4, *, bias: bool = False, memory: int | None = None
    ) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size {kernel_size} must be at least 1")
        self.dim, self.kernel_size = dim, kernel_size
        self.memory = kernel_size - 1 if memory is None else memory
        if self.memory < kernel_size - 1:
            raise ValueError(
                f"memory {memory} is too short: a kernel of {kernel_size} looks back "
                f"{kernel_size - 1} inputs"
            )
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        nn.init.uniform_(self.weight, -(kernel_size**-0.5), kernel_size**-0.5)

    def init_state(self, batch_size: int, *, device=None, dtype=None) -> Tensor:  # type: ignore[no-untyped-def]
        """Return zeros (B, M, C)."""
        return torch.zeros(batch_size, self.memory, self.dim, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, state: Tensor | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve (B, N, C); padded tokens (``mask`` False) are skipped as if absent.

        Returns:
            (B, N, C) and the next state (B, M, C).
        """
        moved = None if mask is None else compact(mask)
        if moved is not None:
            x = moved.gather(x) * moved.front[..., None]
        if state is None:
            state = x.new_zeros(x.shape[0], self.memory, self.dim)
        state = state.to(x)
        y = short_conv(x, state[:, self.memory - self.kernel_size + 1 :], self.weight, self.bias)
        keep, length = self.memory, x.shape[1]
        if moved is None and not torch.compiler.is_compiling():
            # Copies: a view would keep the whole sequence alive.
            return y, torch.cat((state[:, length:], x[:, max(length - keep, 0) :]), 1)
        wide = torch.cat((state, x), 1)
        if moved is None:  # a graph for any length must not ask which of the two is longer
            return y, wide[:, length:].clone()
        ends = moved.front.sum(1, keepdim=True) + torch.arange(keep, device=x.device)
        return moved.scatter(y), wide.gather(1, ends[..., None].expand(-1, -1, self.dim))
