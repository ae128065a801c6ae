"""URPE attention through any kernel that returns a log-sum-exp. B, H, N, M, D as elsewhere.

With a multiplier c > 0, C ∘ softmax(S) = exp(lse(S + ln C) − lse(S)) · softmax(S + ln C), row by
row. A signed one is cut into its positive and negative part and the two results are subtracted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LSEKernel", "dense_kernel", "urpe_from_lse"]

LSEKernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


def dense_kernel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """softmax(Q Kᵀ + B) V (B, H, N, V) and its log-sum-exp (B, H, N), through the N x M matrix.

    A row whose scores are all −inf gives 0 and −inf.
    """
    scores = query @ key.mT
    if bias is not None:
        scores = scores + bias
    empty = torch.isneginf(scores).all(-1, keepdim=True)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp().masked_fill(empty, 0)
    return weights @ value, lse.masked_fill(empty, -torch.inf).squeeze(-1)


def urpe_from_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor,
    *,
    kernel: LSEKernel = dense_kernel,
) -> Tensor:
    """Return (C ∘ softmax(Q Kᵀ + B)) V by at most two calls of a kernel and one for its lse.

    Exact. Entries of C that are 0 get no gradient here: it would have to pass ln 0. Gradients
    need a kernel whose log-sum-exp is differentiable, as :func:`dense_kernel` is.

    Args:
        query: (B, H, N, D), with the scale folded in; key (B, H, M, D), value (B, H, M, V).
        bias: broadcast to (B, H, N, M); −inf hides a key.
        multiplier: C, broadcast to (B, H, N, M).
        kernel: ``(query, key, value, bias) -> (out, lse)``, for instance around torch's flash
            attention.
    """
    _, total = kernel(query, key, value, bias)
    out = None
    for sign in (1, -1):
        part = (sign * multiplier).clamp_min(0)
        held = part > 0
        if sign < 0 and not held.any():
            break
        # Two steps of where: ln 0 must not meet a gradient.
        log = torch.where(held, part, 1).log().masked_fill(~held, -torch.inf)
        mixed, lse = kernel(query, key, value, log if bias is None else log + bias)
        seen = ~torch.isneginf(lse)
        gap = torch.where(seen, lse, 0) - torch.where(torch.isneginf(total), 0, total)
        factor = torch.where(seen, gap.exp(), 0)
        term = sign * factor[..., None] * torch.where(seen[..., None], mixed, 0)
        out = term if out is None else out + term
    assert out is not None
    return out
