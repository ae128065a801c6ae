"""Eviction as a mask over one pass: what published accuracies were measured with (2407.20485).

B batch, H heads, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Simulation", "simulate_eviction"]


class Simulation(NamedTuple):
    """Which keys each query may use, (B, H, N, N), True = it may; and the attention that leaves."""

    keep: Tensor
    attention: Tensor


def simulate_eviction(
    logits: Tensor, *, sink: int = 0, select: int, recent: int, alpha: float = 0.2
) -> Simulation:
    """Return what a cache of sink + select + recent tokens would leave of a full attention matrix.

    A loop over the tokens on the whole matrix: for measuring quality, it saves nothing. Query t
    sees at most one key more than the cache holds, its own.

    Args:
        logits: (B, H, N, N), scaled scores; what is above the diagonal is not read.
        sink: first tokens that are never evicted.
        select: tokens that stay for their scores.
        recent: newest tokens that are never evicted.
        alpha: forgetting factor of the scores, in [0, 1]; 1 is H2O.

    Returns:
        keep and the attention weights under it.

    Raises:
        ValueError: a matrix that is not square, a negative number, alpha outside [0, 1].

    Example:
        >>> simulate_eviction(torch.zeros(1, 1, 9, 9), select=2, recent=2).keep[0, 0, 8].sum()
        tensor(5)
    """
    length = logits.shape[-1]
    if logits.ndim != 4 or logits.shape[-2] != length:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, H, N, N)")
    for name, value in (("sink", sink), ("select", select), ("recent", recent)):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected 0 or more tokens")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected a factor in [0, 1]")
    below = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
    lowest = torch.finfo(logits.dtype).min
    attention = logits.masked_fill(~below, lowest).softmax(-1)
    keep = below.expand_as(logits).clone()
    budget = sink + select + recent
    first = range(min(budget, length))
    score = torch.zeros_like(attention[:, :, 0])
    for t in first:
        score = alpha * score + attention[:, :, t]
    allowed = torch.ones_like(score, dtype=torch.bool)
    for t in range(budget, length - 1):
        row = attention[:, :, t] * allowed
        score = alpha * score + row / row.sum(-1, keepdim=True)
        # One has to go: an old one while there are any that are protected by nothing.
        candidates = score.masked_fill(~allowed, torch.inf)[:, :, sink : t - recent + 1]
        if candidates.shape[-1]:
            gone = sink + candidates.argmin(-1, keepdim=True)
            allowed = allowed.scatter(-1, gone, False)
        keep[:, :, t + 1] &= allowed
    return Simulation(keep, logits.masked_fill(~keep, lowest).softmax(-1))
