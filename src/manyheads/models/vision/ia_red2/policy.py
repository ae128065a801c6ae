"""Policies and their gradient: which tokens are kept, what that earned, what made it likelier.

B batch, N tokens that can be dropped (the class token is none of them).

Reward of a right answer: 1 − (kept / N)². Of a wrong one: −penalty. The advantage is the reward of
the drawn policy less that of the policy by threshold (self-critical), and the loss

    −mean over B of advantage · Σ_j log Bernoulli(u_j; score_j).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "bounded",
    "draw_policy",
    "greedy_policy",
    "log_probability",
    "policy_gradient_loss",
    "reward",
]


def greedy_policy(scores: Tensor, alive: Tensor | None = None, *, threshold: float = 0.5) -> Tensor:
    """Return which tokens are kept, bool (B, N): those that score above the threshold.

    Args:
        scores: (B, N) in [0, 1].
        alive: (B, N), those that were kept so far; None: all.
        threshold: kept is what lies above it, not on it.
    """
    kept = scores > threshold
    return kept if alive is None else kept & alive.bool()


def draw_policy(
    scores: Tensor, alive: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which tokens are kept, bool (B, N): each with its score as probability.

    Random; reproducible with a ``generator``. Without ``alive`` every token can be drawn.
    """
    noise = torch.rand(scores.shape, generator=generator, device=scores.device, dtype=scores.dtype)
    kept = noise < scores
    return kept if alive is None else kept & alive.bool()


def bounded(scores: Tensor, explore: float = 0.2) -> Tensor:
    """Return (1 − e) p + e (1 − p): probabilities that leave room for either decision.

    Raises:
        ValueError: ``explore`` outside [0, 0.5].
    """
    if not 0 <= explore <= 0.5:
        raise ValueError(f"explore {explore} must lie in [0, 0.5]: beyond, decisions are reversed")
    return scores * (1 - 2 * explore) + explore


def log_probability(policy: Tensor, scores: Tensor, alive: Tensor | None = None) -> Tensor:
    """Return Σ_j log Bernoulli(u_j; p_j), (B,), over the tokens that a decision was made about.

    Certain decisions (p of 0 or 1) that came out so add nothing, and no NaN to the gradient; where
    rounding made an impossible decision, it counts as the least probability the type can tell.

    Args:
        policy: (B, N), 1 for kept.
        scores: (B, N) probabilities to keep.
        alive: (B, N): decisions about others are left out.
    """
    chance = torch.where(policy.bool(), scores, 1 - scores)
    terms = chance.clamp_min(torch.finfo(scores.dtype).tiny).log()
    if alive is not None:
        terms = torch.where(alive.bool(), terms, 0)
    return terms.sum(-1)


def reward(policy: Tensor, correct: Tensor, *, penalty: float = 5.0) -> Tensor:
    """Return 1 − (kept / N)² where the answer is right, else −penalty; (B,).

    Args:
        policy: (B, N), 1 for kept.
        correct: (B,), 1 where the model answered rightly with the tokens kept.
        penalty: τ > 0.

    Raises:
        ValueError: shapes that do not fit, no tokens, or a penalty below 0.
    """
    if policy.ndim != 2 or not policy.shape[1]:
        raise ValueError(f"policy has shape {tuple(policy.shape)}, expected (batch, tokens >= 1)")
    if correct.shape != policy.shape[:1]:
        raise ValueError(
            f"correct has shape {tuple(correct.shape)}, expected (batch,) = ({policy.shape[0]},)"
        )
    if penalty < 0:
        raise ValueError(f"penalty {penalty} must not be negative: wrong answers would be paid")
    dtype = policy.dtype if policy.is_floating_point() else torch.get_default_dtype()
    share = policy.to(dtype).mean(-1)
    return torch.where(correct.bool(), 1 - share.square(), -penalty)


def policy_gradient_loss(
    scores: Tensor, policy: Tensor, advantage: Tensor, alive: Tensor | None = None
) -> Tensor:
    """Return the loss whose gradient is the policy gradient's estimate; a scalar.

    Unbiased for the expected reward, whatever the baseline that ``advantage`` has in it, as long
    as that baseline does not depend on the draw (the reward by threshold does not).

    Args:
        scores: (B, N) probabilities that the policy was drawn from; they get the gradient.
        policy: (B, N) as drawn.
        advantage: (B,), reward of the draw less that of the policy by threshold.
        alive: (B, N): tokens that a decision was made about; None: all.

    Example:
        >>> scores = torch.full((2, 4), 0.5, requires_grad=True)
        >>> policy_gradient_loss(scores, torch.eye(4)[:2], torch.ones(2)).backward()
        >>> scores.grad[0].tolist()
        [-1.0, 1.0, 1.0, 1.0]
    """
    return -(advantage.detach() * log_probability(policy, scores, alive)).mean()
