"""MiniLM's losses by their equations, one sample at a time: the oracle of the tests.

B batch, A heads, N padded length, D head dim (the teacher's and the student's may differ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.layers.ragged import check_mask

__all__ = ["relation_loss_reference"]


def relation_loss_reference(
    teacher_left: Tensor,
    teacher_right: Tensor,
    student_left: Tensor,
    student_right: Tensor,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean over samples of 1/(A·n) Σ_a Σ_t KL(R^T_{a,t} || R^S_{a,t}), in nats.

    R = softmax(left · rightᵀ / √D) over the n real tokens of a sample: queries and keys give the
    attention transfer of 2002.10957, values and values its value relation. Samples without a real
    token are left out. Gradients flow on both sides.

    Args:
        teacher_left, teacher_right: (B, A, N, D).
        student_left, student_right: (B, A, N, D'), of any D'.
        mask: (B, N), True = a real token, on any side.

    Raises:
        ValueError: a mask of another shape.
    """
    batch, _, length, _ = teacher_left.shape
    mask = check_mask(mask, batch, length)
    losses = []
    for row in range(batch):
        real = slice(None) if mask is None else mask[row]
        teacher, student = (
            torch.log_softmax(
                left[row][:, real] @ right[row][:, real].mT / left.shape[-1] ** 0.5, -1
            )
            for left, right in ((teacher_left, teacher_right), (student_left, student_right))
        )
        if teacher.numel():
            losses.append((teacher.exp() * (teacher - student)).sum(-1).mean())
    return torch.stack(losses).mean() if losses else student_left.sum() * 0
