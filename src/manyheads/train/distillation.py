"""Learning from a teacher's classes beside the labels: DeiT's loss (2012.12877).

B batch, K classes.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Distillation", "distillation_loss"]

Distillation = Literal["none", "soft", "hard"]


def distillation_loss(
    outputs: Any,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    kind: Distillation = "hard",
    weight: float = 0.5,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Return (1 - w) · cross entropy of labels + w · the loss against a teacher's logits, in nats.

    Hard: cross entropy of the teacher's most likely class. Soft: T² · KL(teacher / T, student / T)
    over B · K, the mean over classes too, as DeiT has it. The teacher gets no gradient.

    Args:
        outputs: a pair of logits (B, K), for labels and for the teacher, as a model returns in
            training after ``set_distilled_training()``; for "none" also one tensor.
        labels: classes (B,) or mixed labels (B, K).
        teacher: its logits (B, K).
        kind: "none" is the cross entropy of labels alone.
        weight: w, of the teacher.
        temperature: T, of the soft loss.
        smoothing: of the labels, where they are classes.

    Raises:
        ValueError: an unknown kind, a single output or no teacher where two are needed, or a
            weight or temperature that cannot be.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> distillation_loss((logits, logits), torch.tensor([0, 3]), logits).round(decimals=3)
        tensor(1.3860)
    """
    if kind not in get_args(Distillation):
        raise ValueError(f"kind {kind!r} must be one of {get_args(Distillation)}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight {weight} must lie in [0, 1]")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} must be positive")
    alone = isinstance(outputs, Tensor)
    if alone and kind != "none":
        raise ValueError(
            "the model returned one tensor of logits: call set_distilled_training() and train(), "
            "or pass kind='none'"
        )
    own, other = (outputs, outputs) if alone else outputs
    base = F.cross_entropy(own, labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)
    if kind == "none":
        return base
    if teacher is None:
        raise ValueError(f"kind {kind!r} needs teacher=, its logits (B, K)")
    teacher = teacher.detach()
    if kind == "hard":
        return (1 - weight) * base + weight * F.cross_entropy(other, teacher.argmax(-1))
    divergence = F.kl_div(
        torch.log_softmax(other / temperature, -1),
        torch.log_softmax(teacher / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    return (1 - weight) * base + weight * divergence * temperature**2 / other.numel()
