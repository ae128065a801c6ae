"""The interpreter of IA-RED²: how much each token tells, judged from the class token (2106.12620).

B batch, N tokens (the class token first), C channels, I interpreter heads.

    z = LayerNorm(x · u),  q = W_q z_cls + b_q,  k = W_k z + b_k
    score_j = u_j · mean over heads of sigmoid(q · k_j / sqrt(C / I))

u is 1 for tokens that are still there, and the norm has no weights. Only the class token's query
is needed, so the keys are never made: W_kᵀ q is, at a cost of C² + I · N · C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.layers.precision import no_autocast

__all__ = ["Interpreter", "interpreter_reference"]

_EPS = 1e-5


def interpreter_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, alive: Tensor | None = None
) -> Tensor:
    """Return scores (B, N) in [0, 1] of tokens (B, N, C), as the paper defines them.

    Args:
        x: tokens, the class token first.
        weight, bias: (3C, C) and (3C) of queries, keys, and a third part that is not read.
        num_heads: I.
        alive: (B, N), 1 for tokens that are still there; None: all.
    """
    u = x.new_ones(x.shape[:2]) if alive is None else alive.to(x)
    z = F.layer_norm(x * u[..., None], x.shape[2:], eps=_EPS)
    q, k, _ = F.linear(z, weight, bias).chunk(3, -1)
    q, k = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k))
    logits = q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5
    return logits.sigmoid().mean(1)[:, 0] * u


class Interpreter(nn.Module):
    """Scores of tokens; approximate models are built on their threshold, so they are float32.

    It learns by policy gradients alone. A new one gives every token about ``first_score``.

    Args:
        dim: C.
        num_heads: I; 6 in the released model for either width.
        first_score: of a new interpreter, in (0, 1); above 0.5 nothing is dropped yet.

    Raises:
        ValueError: heads that do not divide the width, or a score outside (0, 1).

    Example:
        >>> scores = Interpreter(48, 6)(torch.randn(2, 11, 48))
        >>> scores.shape, bool((scores > 0.5).all())
        (torch.Size([2, 11]), True)
    """

    def __init__(self, dim: int, num_heads: int = 6, *, first_score: float = 0.7) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of {num_heads} interpreter heads")
        if not 0 < first_score < 1:
            raise ValueError(f"first_score {first_score} must lie between 0 and 1")
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 3 * dim)
        nn.init.trunc_normal_(self.qk.weight, std=0.02)
        nn.init.zeros_(self.qk.bias)
        # The biases alone give q · k / sqrt(D) = the logit of first_score.
        logit = math.log(first_score / (1 - first_score))
        size = math.sqrt(abs(logit) / math.sqrt(dim / num_heads))
        with torch.no_grad():
            self.qk.bias[:dim] = math.copysign(size, logit)
            self.qk.bias[dim : 2 * dim] = size

    def forward(self, x: Tensor, alive: Tensor | None = None) -> Tensor:
        """Return scores (B, N) of tokens (B, N, C); ``alive`` (B, N) as in the reference."""
        with no_autocast(x.device):
            x = x if x.dtype == torch.float64 else x.float()
            weight, bias = self.qk.weight.to(x.dtype), self.qk.bias.to(x.dtype)
            dim, heads = x.shape[2], self.num_heads
            if alive is not None:
                x = torch.where(alive[..., None].bool(), x, 0)
            z = F.layer_norm(x, (dim,), eps=_EPS)
            q = F.linear(z[:, 0], weight[:dim], bias[:dim]) * (dim / heads) ** -0.5
            q = q.unflatten(1, (heads, -1))
            keys = weight[dim : 2 * dim].unflatten(0, (heads, -1))
            reader = torch.einsum("bid,idc->bic", q, keys)  # (B, I, C)
            offset = (q * bias[dim : 2 * dim].unflatten(0, (heads, -1))).sum(-1)
            scores = (torch.baddbmm(offset[..., None], reader, z.mT)).sigmoid().mean(1)
            return scores if alive is None else scores * alive.to(scores)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
