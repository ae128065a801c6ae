"""Losses of token labels: soft labels for the class token and for every patch token.

Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers",
2104.10858. B batch, C classes, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.models.vision.volo.mixing import Box

__all__ = ["blend_ground_truth", "soft_target_loss", "token_label_loss"]


def soft_target_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean over rows of -Σ target · log softmax(logits), both (rows, C).

    Rows of the target need not sum to one.

    Example:
        >>> soft_target_loss(torch.zeros(3, 4), torch.full((3, 4), 0.25))
        tensor(1.3863)
    """
    if not torch.compiler.is_compiling() and logits.shape != target.shape:
        raise ValueError(
            f"the target {tuple(target.shape)} must have the shape of the logits "
            f"{tuple(logits.shape)}: a probability for every class"
        )
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def blend_ground_truth(target: Tensor) -> Tensor:
    """Return class labels (B, C) of a target (B, C, 2 + N), corrected by the ground truth.

    t r + g (1 - r), with r = 0.5 where the largest entries of both are the same class, else 0.9.
    """
    truth, label = target[:, :, 0], target[:, :, 1]
    match = (truth.argmax(1) == label.argmax(1)).to(target.dtype)
    ratio = (0.9 - 0.4 * match)[:, None]
    return label * ratio + truth * (1 - ratio)


def token_label_loss(
    logits: Tensor,
    token_logits: Tensor,
    target: Tensor,
    box: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    class_weight: float = 1.0,
    token_weight: float = 0.5,
    ground_truth: bool = False,
) -> Tensor:
    """Return class_weight · CE(class token) + token_weight · CE(patch tokens).

    Where a box was mixed, the class label is mixed with that of the batch in reverse by the share
    of tokens outside; token labels are not, because the model puts its token logits back.

    Args:
        logits: (B, C).
        token_logits: (B, N, C).
        target: (B, C, 2 + N): one-hot ground truth, class label, token labels, as
            :func:`token_targets` makes them; or (B, C), which stands for every token as well.
        box: (top, left, bottom, right) in tokens, as :meth:`VOLO.forward_train` returns it.
        class_weight, token_weight: of the two terms.
        ground_truth: correct the class label by the ground truth (fine-tuning); targets (B, C) are
            taken as they are.

    Raises:
        ValueError: the target has other classes, tokens or axes than the logits.

    Example:
        >>> cls, tokens = torch.zeros(2, 5), torch.zeros(2, 4, 5)
        >>> token_label_loss(cls, tokens, torch.full((2, 5, 6), 0.2), (0, 0, 1, 2))
        tensor(2.4142)
    """
    batch, tokens, classes = token_logits.shape
    _check(logits, token_logits, target)
    if target.ndim == 2:
        label = target
        dense = target[:, None].expand(batch, tokens, classes)
    else:
        label = blend_ground_truth(target) if ground_truth else target[:, :, 1]
        dense = target[:, :, 2:].mT
    area = Box(*box).area
    if area > 0:
        kept = 1 - area / tokens
        label = kept * label + (1 - kept) * label.flip(0)
    of_class = soft_target_loss(logits, label)
    of_tokens = soft_target_loss(token_logits.flatten(0, 1), dense.reshape(-1, classes))
    return class_weight * of_class + token_weight * of_tokens


def _check(logits: Tensor, token_logits: Tensor, target: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    batch, tokens, classes = token_logits.shape
    if logits.shape != (batch, classes):
        raise ValueError(
            f"logits {tuple(logits.shape)} and token logits {tuple(token_logits.shape)} must "
            "share batch and classes"
        )
    if target.ndim not in (2, 3) or target.shape[:2] != (batch, classes):
        raise ValueError(
            f"the target {tuple(target.shape)} must be ({batch}, {classes}) or "
            f"({batch}, {classes}, {2 + tokens})"
        )
    if target.ndim == 3 and target.shape[2] != 2 + tokens:
        raise ValueError(
            f"the target has {target.shape[2] - 2} token labels, the model {tokens} tokens: make "
            "them with size= of the token grid, the image's side / 16"
        )
