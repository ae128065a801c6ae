"""One step of IA-RED²'s training: cross entropy on what was kept, and the policy's gradient.

B batch, N tokens, K classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.models.vision.ia_red2 import (
    Dropping,
    Outcome,
    bounded,
    draw_policy,
    policy_gradient_loss,
    reward,
)

__all__ = ["dropping_loss"]


def dropping_loss(
    model: Dropping,
    images: Tensor,
    labels: Tensor,
    *,
    last: int | None = None,
    penalty: float = 5.0,
    explore: float = 0.2,
    policy_weight: float = 0.05,
    smoothing: float = 0.0,
    dense: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a loss that trains backbone and interpreters together; a scalar, random.

    Policies are drawn, the answer to what they keep is judged by its cross entropy, and each group
    up to ``last`` is paid 1 − (kept share)² for a right answer, −penalty for a wrong one, less what
    the policy by threshold earns. Groups behind ``last`` follow its policy: with ``last`` = 0, 1,
    ... in turn this is the paper's curriculum.

    Args:
        model: with :meth:`Dropping.unfreeze_interpreters` called; else its backbone alone learns.
        images: what the model eats.
        labels: class numbers (B,).
        last: the last group that decides, from 0; None: all decide.
        penalty: τ.
        explore: policies are drawn from (1 − e) p + e (1 − p).
        policy_weight: of the policy gradient beside the cross entropy.
        smoothing: of the labels.
        dense: drop nothing: the backbone learns alone.
        generator: of the draw.

    Raises:
        ValueError: labels that are no class numbers, or a group that does not exist.

    Example:
        >>> from manyheads.models import create_model
        >>> model = create_model("deit_small", groups=(1, 1), embed_dim=48, image_size=32)
        >>> images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        >>> loss = dropping_loss(model.unfreeze_interpreters(), images, labels, last=0)
        >>> loss.backward()
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and type {labels.dtype}: give class numbers "
            "(batch,), because an answer has to be right or wrong"
        )
    if dense:
        whole = model.look(images, decide=_keep_all, last=0)
        return F.cross_entropy(whole.logits.float(), labels, label_smoothing=smoothing) + _silent(
            model
        )
    draw = partial(_explore, explore=explore, generator=generator)
    drawn = model.look(images, decide=draw, last=last)
    loss = F.cross_entropy(drawn.logits.float(), labels, label_smoothing=smoothing)
    with torch.no_grad():
        greedy = model.look(images, last=last)
    for group, decision in enumerate(drawn.decisions):
        advantage = _earned(model, drawn, group, labels, penalty) - _earned(
            model, greedy, group, labels, penalty
        )
        behind = slice(model.prefix, None)
        loss = loss + policy_weight * policy_gradient_loss(
            bounded(decision.scores[:, behind], explore),
            decision.policy[:, behind],
            advantage,
            decision.alive[:, behind],
        )
    return loss + _silent(model)


def _explore(
    group: int, scores: Tensor, alive: Tensor, *, explore: float, generator: torch.Generator | None
) -> Tensor:
    return draw_policy(bounded(scores.detach(), explore), alive, generator=generator)


def _keep_all(group: int, scores: Tensor, alive: Tensor) -> Tensor:
    return torch.ones_like(alive)


def _earned(model: Dropping, out: Outcome, group: int, labels: Tensor, penalty: float) -> Tensor:
    right = out.logits.argmax(-1) == labels
    return reward(out.policies[group][:, model.prefix :], right, penalty=penalty)


def _silent(model: nn.Module) -> Tensor | float:
    """Return nothing; where several processes train, nothing of every parameter, as they need."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0.0
    return 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
