"""MiniLM's losses, fused: blocks of rows whose gradient is made on the way (2002.10957).

The divergence is a sum over rows, and its gradient by the student's logits is p_student -
p_teacher: nothing of N x N outlives its block, and no graph is kept. B batch, A heads, N padded
length, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.ragged import check_mask

__all__ = [
    "MINILM_V1",
    "MINILM_V2",
    "QKV",
    "Relation",
    "attention_transfer_loss",
    "minilm_loss",
    "relation_loss",
    "split_relation_heads",
    "value_relation_loss",
]

# Numbers of one block of a matrix of relations: it and its copies stay in the processor's cache.
_BLOCK_NUMBERS = 1 << 20
# Far below every logit, and finite: the probability is 0 exactly, and so is 0 · log 0.
_NEVER = -1e30


class QKV(NamedTuple):
    """Queries, keys and values of one layer, (B, A, N, D) each."""

    query: Tensor
    key: Tensor
    value: Tensor


class Relation(NamedTuple):
    """Two of "query", "key" and "value", and the weight of their relation in the loss."""

    left: str
    right: str
    weight: float = 1.0


MINILM_V1 = (Relation("query", "key"), Relation("value", "value"))
MINILM_V2 = tuple(Relation(name, name, 1 / 3) for name in ("query", "key", "value"))


def relation_loss(
    teacher_left: Tensor,
    teacher_right: Tensor,
    student_left: Tensor,
    student_right: Tensor,
    *,
    mask: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the mean over samples of 1/(A·n) Σ_a Σ_t KL(R^T_{a,t} || R^S_{a,t}), in nats.

    R = softmax(left · rightᵀ / √D) over the n real tokens of a sample; padding takes no part, and
    samples without a real token are left out of the mean. Time O(A N² D), extra memory of
    ``chunk`` rows of N. Differentiable once, by the student alone; computed in float32 at least.

    Args:
        teacher_left, teacher_right: (B, A, N, D).
        student_left, student_right: (B, A, N, D'), of any D'.
        mask: (B, N), True = a real token, on any side.
        chunk: rows computed at once (None: as many as stay in the cache).

    Raises:
        ValueError: sizes that do not fit; the axis is named.

    Example:
        >>> teacher, student = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 5)
        >>> relation_loss(teacher, teacher, student, student).shape
        torch.Size([])
        >>> relation_loss(teacher, teacher, teacher, teacher).item()
        0.0
    """
    _check(teacher_left, teacher_right, student_left, student_right)
    batch, _, length, _ = student_left.shape
    mask = check_mask(mask, batch, length)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: give 1 row or more, or None")
    rows = chunk or max(1, _BLOCK_NUMBERS // max(1, student_left[..., 0].numel()))
    needed = torch.is_grad_enabled() and (student_left.requires_grad or student_right.requires_grad)
    return _RelationLoss.apply(
        teacher_left.detach(), teacher_right.detach(), student_left, student_right, mask, rows,
        needed,
    )  # fmt: skip


class _RelationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        teacher_left: Tensor,
        teacher_right: Tensor,
        student_left: Tensor,
        student_right: Tensor,
        mask: Tensor | None,
        rows: int,
        needed: bool,
    ) -> Tensor:
        with torch.autocast(student_left.device.type, enabled=False):
            loss, left, right = _fused(
                teacher_left, teacher_right, student_left, student_right, mask, rows, needed
            )
        ctx.save_for_backward(left, right)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        left, right = ctx.saved_tensors
        return None, None, left * grad.to(left), right * grad.to(right), None, None, None


def _fused(
    teacher_left: Tensor,
    teacher_right: Tensor,
    student_left: Tensor,
    student_right: Tensor,
    mask: Tensor | None,
    rows: int,
    needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and, if needed, its gradients by the student's two tensors."""
    kind = torch.promote_types(
        torch.float32, torch.promote_types(student_left.dtype, teacher_left.dtype)
    )
    tl, tr, sl, sr = (
        t.to(kind) for t in (teacher_left, teacher_right, student_left, student_right)
    )
    batch, heads, length, _ = sl.shape
    weights, hidden = _row_weights(mask, batch, heads, length, sl)
    loss = sl.new_zeros(())
    grad_left = torch.zeros_like(sl) if needed else None
    grad_right = torch.zeros_like(sr) if needed else None
    scale = sl.shape[-1] ** -0.5
    for start in range(0, length, rows):
        place = slice(start, start + rows)
        teacher = tl[:, :, place] @ tr.mT * tl.shape[-1] ** -0.5  # (B, A, rows, N)
        student = sl[:, :, place] @ sr.mT * scale
        if hidden is not None:
            teacher.masked_fill_(hidden, _NEVER)
            student.masked_fill_(hidden, _NEVER)
        teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
        target = teacher.exp()
        weight = weights[:, :, place]  # (B, 1, rows, 1)
        loss += ((teacher - student) * target * weight).sum()
        if grad_left is not None and grad_right is not None:
            slope = student.exp_().sub_(target).mul_(weight * scale)
            grad_left[:, :, place] = slope @ sr
            grad_right += slope.mT @ sl[:, :, place]
    if grad_left is None or grad_right is None:
        return loss, None, None
    return loss, grad_left.to(student_left.dtype), grad_right.to(student_right.dtype)


def _row_weights(
    mask: Tensor | None, batch: int, heads: int, length: int, like: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what each row counts, (B, 1, N, 1), and which keys are padding, (B, 1, 1, N)."""
    if mask is None:
        each = 1 / max(1, batch * heads * length)
        return like.new_full((1, 1, 1, 1), each).expand(batch, 1, length, 1), None
    real = mask.sum(1, keepdim=True)
    samples = (real > 0).sum().clamp_min(1)
    weights = mask.to(like) / (real.clamp_min(1) * samples * heads).to(like)
    return weights[:, None, :, None], None if bool(mask.all()) else ~mask[:, None, None]


def split_relation_heads(x: Tensor, heads: int) -> Tensor:
    """Join the heads of (B, A, N, D) and cut the width into ``heads`` others of equal size.

    Raises:
        ValueError: the width A·D is no multiple of ``heads``.
    """
    width = x.shape[1] * x.shape[3]
    if heads < 1 or width % heads:
        raise ValueError(
            f"{heads} relation heads do not divide the width {width}: choose a divisor of the "
            "teacher's and the student's width"
        )
    return x if heads == x.shape[1] else split_heads(merge_heads(x), heads)


def minilm_loss(
    teacher: QKV,
    student: QKV,
    *,
    mask: Tensor | None = None,
    relations: Sequence[Relation] = MINILM_V1,
    relation_heads: int | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Return the weighted sum of the losses of several relations, in nats.

    "MiniLM", 2002.10957, with its defaults; with ``MINILM_V2`` and ``relation_heads`` the
    generalisation of "MiniLMv2", 2012.15828, which frees the number of heads. The cost is that of
    :func:`relation_loss` for each relation.

    Args:
        teacher, student: of one layer each, (B, A, N, D); no gradient reaches the teacher.
        mask: (B, N), True = a real token.
        relations: which pairs, and their weights.
        relation_heads: heads that both are cut into (None: their own, which must be equal).
        chunk: rows computed at once.

    Raises:
        ValueError: no or unknown relations, unequal heads without ``relation_heads``, or other
            sizes that do not fit.

    Example:
        >>> teacher = QKV(*torch.randn(3, 2, 6, 7, 8).unbind())
        >>> student = QKV(*torch.randn(3, 2, 4, 7, 6).unbind())
        >>> minilm_loss(teacher, student, relations=MINILM_V2, relation_heads=12).shape
        torch.Size([])
    """
    if not relations:
        raise ValueError("relations is empty: give at least one, such as MINILM_V1")
    teacher_heads, student_heads = teacher.query.shape[1], student.query.shape[1]
    if relation_heads is not None:
        teacher = QKV(*(split_relation_heads(t, relation_heads) for t in teacher))
        student = QKV(*(split_relation_heads(t, relation_heads) for t in student))
    elif teacher_heads != student_heads:
        raise ValueError(
            f"the teacher has {teacher_heads} heads and the student {student_heads}: give both as "
            "many, or relation_heads that divide both widths"
        )
    total = torch.zeros((), device=student.query.device)
    for left, right, weight in map(Relation._make, relations):
        for name in (left, right):
            if name not in QKV._fields:
                raise ValueError(f"relation of {name!r}: give query, key or value")
        loss = relation_loss(
            getattr(teacher, left), getattr(teacher, right),
            getattr(student, left), getattr(student, right),
            mask=mask, chunk=chunk,
        )  # fmt: skip
        total = total + weight * loss
    return total


def attention_transfer_loss(
    teacher: QKV, student: QKV, *, mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Return KL of attention distributions, queries with keys; arguments as `minilm_loss`."""
    return minilm_loss(teacher, student, mask=mask, relations=MINILM_V1[:1], chunk=chunk)


def value_relation_loss(
    teacher: QKV, student: QKV, *, mask: Tensor | None = None, chunk: int | None = None
) -> Tensor:
    """Return KL of the values' relations with each other; arguments as :func:`minilm_loss`."""
    return minilm_loss(teacher, student, mask=mask, relations=MINILM_V1[1:], chunk=chunk)


def _check(
    teacher_left: Tensor, teacher_right: Tensor, student_left: Tensor, student_right: Tensor
) -> None:
    for side, left, right in (
        ("teacher", teacher_left, teacher_right),
        ("student", student_left, student_right),
    ):
        if left.ndim != 4 or left.shape != right.shape:
            raise ValueError(
                f"the {side}'s tensors have shapes {tuple(left.shape)} and {tuple(right.shape)}: "
                "both must be (batch, heads, length, head_dim), of equal sizes"
            )
    for axis, name in enumerate(("batch", "heads", "length")):
        a, b = teacher_left.shape[axis], student_left.shape[axis]
        if a != b:
            fix = "see relation_heads" if name == "heads" else "give both the same tokens"
            raise ValueError(f"{name} of teacher and student differ: {a} and {b} ({fix})")
