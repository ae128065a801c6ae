"""The loss against a teacher, beside the golden files."""

from __future__ import annotations

import pytest
import torch

from manyheads.train.distillation import distillation_loss


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    labels = torch.tensor([0, 4, 2])
    distillation_loss((student, student), labels, teacher, kind="soft").backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_the_teacher_himself_has_no_soft_loss() -> None:
    teacher = torch.randn(4, 6)
    loss = distillation_loss((teacher, teacher), torch.zeros(4).long(), teacher, kind="soft",
                             weight=1.0, temperature=3.0)  # fmt: skip
    assert abs(float(loss)) < 1e-6


def test_mixed_labels_and_one_output() -> None:
    logits = torch.randn(3, 5)
    mixed = torch.eye(5)[:3]
    assert torch.allclose(
        distillation_loss(logits, mixed, kind="none"),
        distillation_loss(logits, torch.arange(3), kind="none"),
    )


def test_errors_name_the_value() -> None:
    logits, labels = torch.randn(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match="one tensor"):
        distillation_loss(logits, labels, logits)
    with pytest.raises(ValueError, match="needs teacher"):
        distillation_loss((logits, logits), labels)
    with pytest.raises(ValueError, match="kind 'warm'"):
        distillation_loss((logits, logits), labels, logits, kind="warm")
    with pytest.raises(ValueError, match="weight 2"):
        distillation_loss((logits, logits), labels, logits, weight=2)
    with pytest.raises(ValueError, match="temperature 0"):
        distillation_loss((logits, logits), labels, logits, temperature=0)
