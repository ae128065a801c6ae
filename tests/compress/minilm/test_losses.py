"""The fused losses against their equations, on ragged batches of odd sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compare import relative_error
from manyheads.choose.memory import track_memory
from manyheads.compress.minilm import (
    MINILM_V1,
    MINILM_V2,
    QKV,
    Relation,
    attention_transfer_loss,
    minilm_loss,
    relation_loss,
    relation_loss_reference,
    split_relation_heads,
    value_relation_loss,
)


def tensors(batch=3, heads=5, length=13, teacher=20, student=7, dtype=torch.float64):
    made = [torch.randn(batch, heads, length, d, dtype=dtype) for d in (teacher,) * 2]
    made += [torch.randn(batch, heads, length, student, dtype=dtype) for _ in range(2)]
    return made


def ragged(length=13) -> Tensor:
    """Padding on the right, on the left, and all but one token."""
    places = torch.arange(length)
    return torch.stack((places < 9, places >= 4, places == 6))


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_its_equations(chunk, padded) -> None:
    tl, tr, sl, sr = tensors()
    mask = ragged() if padded else None
    found = []
    for run in (
        relation_loss_reference,
        lambda *a, mask: relation_loss(*a, mask=mask, chunk=chunk),
    ):
        left, right = sl.clone().requires_grad_(), sr.clone().requires_grad_()
        loss = run(tl, tr, left, right, mask=mask)
        (3 * loss).backward()
        found.append((loss.detach(), left.grad, right.grad))
    for reference, fast in zip(*found, strict=True):
        assert relative_error(fast, reference) < 1e-12


def test_gradient_where_both_sides_are_one_tensor() -> None:
    (t, _, s, _), mask = tensors(), ragged()
    grads = []
    for run in (relation_loss_reference, relation_loss):
        own = s.clone().requires_grad_()
        run(t, t, own, own, mask=mask).backward()
        grads.append(own.grad)
    assert relative_error(grads[1], grads[0]) < 1e-12
    assert torch.autograd.gradcheck(
        lambda x: relation_loss(t, t, x, x, mask=mask), (s[:, :, :, :3].clone().requires_grad_(),)
    )


def test_padding_takes_no_part_whatever_it_holds() -> None:
    made, mask = tensors(), ragged()
    wild = [torch.where(mask[:, None, :, None], t, 1e6 * torch.randn_like(t)) for t in made]
    assert torch.equal(relation_loss(*made, mask=mask), relation_loss(*wild, mask=mask))
    left, right = (t.requires_grad_() for t in wild[2:])
    relation_loss(*wild[:2], left, right, mask=mask).backward()
    assert not left.grad[~mask[:, None].expand(-1, 5, -1)].any()
    assert not right.grad[~mask[:, None].expand(-1, 5, -1)].any()


def test_every_sample_counts_alike_and_empty_ones_not_at_all() -> None:
    made, mask = tensors(), ragged()
    each = [relation_loss(*(t[i : i + 1] for t in made), mask=mask[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(relation_loss(*made, mask=mask), torch.stack(each).mean())
    mask[1] = False
    torch.testing.assert_close(relation_loss(*made, mask=mask), (each[0] + each[2]) / 2)
    torch.testing.assert_close(relation_loss_reference(*made, mask=mask), (each[0] + each[2]) / 2)
    assert relation_loss(*made, mask=torch.zeros_like(mask)) == 0


def test_extreme_logits_stay_finite() -> None:
    made = [300 * t for t in tensors(dtype=torch.float32)]
    left, right = (t.requires_grad_() for t in made[2:])
    loss = relation_loss(*made[:2], left, right, mask=ragged())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(left.grad).all()
    exact = relation_loss_reference(*(t.double() for t in made), mask=ragged())
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    made = [t.bfloat16() for t in tensors(dtype=torch.float32)]
    exact = relation_loss(*(t.float() for t in made))
    loss = relation_loss(*made[:2], *(t.requires_grad_() for t in made[2:]))
    assert torch.equal(loss, exact)
    loss.backward()
    assert made[2].grad.dtype == torch.bfloat16


def test_zero_for_a_student_that_is_its_teacher() -> None:
    own = QKV(*torch.randn(3, 2, 4, 11, 8).unbind())
    assert minilm_loss(own, own).abs() < 1e-6
    assert minilm_loss(own, own, relations=MINILM_V2, relation_heads=2).abs() < 1e-6


def test_v1_is_a_case_of_the_general_form() -> None:
    teacher, student = (QKV(*torch.randn(3, 3, 6, 9, d).unbind()) for d in (10, 4))
    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    v1 = minilm_loss(teacher, student, mask=mask)
    parts = attention_transfer_loss(teacher, student, mask=mask)
    parts = parts + value_relation_loss(teacher, student, mask=mask)
    torch.testing.assert_close(v1, parts)
    general = minilm_loss(teacher, student, mask=mask, relations=MINILM_V1, relation_heads=6)
    assert torch.equal(v1, general)
    weighed = minilm_loss(teacher, student, relations=[Relation("key", "value", 2.0)])
    once = minilm_loss(teacher, student, relations=[Relation("key", "value")])
    torch.testing.assert_close(weighed, 2 * once)


def test_relation_heads_cut_the_joined_width() -> None:
    x = torch.randn(2, 6, 5, 4)
    cut = split_relation_heads(x, 3)
    joined = x.transpose(1, 2).reshape(2, 5, 24)
    assert torch.equal(cut[:, 1], joined[..., 8:16])
    teacher, student = QKV(x, x, x), QKV(*torch.randn(3, 2, 4, 5, 3).unbind())
    assert minilm_loss(teacher, student, relation_heads=12) > 0


def test_no_gradient_reaches_the_teacher() -> None:
    made = [t.requires_grad_() for t in tensors()]
    relation_loss(*made).backward()
    assert made[0].grad is None
    assert made[2].grad is not None


def test_memory_is_that_of_a_block_of_rows() -> None:
    made = tensors(batch=1, heads=4, length=515, teacher=8, student=8, dtype=torch.float32)
    for t in made[2:]:
        t.requires_grad_()
    with track_memory() as blocks:
        relation_loss(*made, chunk=16).backward()
    with track_memory() as whole:
        relation_loss(*made, chunk=515).backward()
    assert blocks.peak < whole.peak / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"mask": torch.ones(3, 12, dtype=torch.bool)}, r"mask has shape \(3, 12\)"),
        ({"mask": torch.ones(3, 13)}, "floating|dtype"),
    ],
)
def test_bad_options(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        relation_loss(*tensors(), **change)


def test_bad_sizes() -> None:
    tl, tr, sl, sr = tensors()
    with pytest.raises(ValueError, match="length of teacher and student differ: 13 and 12"):
        relation_loss(tl, tr, sl[:, :, :12], sr[:, :, :12])
    with pytest.raises(ValueError, match="the student's tensors have shapes"):
        relation_loss(tl, tr, sl, sr[..., :5])
    six, four = (QKV(*torch.randn(3, 1, h, 5, 4).unbind()) for h in (6, 4))
    with pytest.raises(ValueError, match="the teacher has 6 heads and the student 4"):
        minilm_loss(six, four)
    with pytest.raises(ValueError, match="5 relation heads do not divide the width 24"):
        minilm_loss(six, four, relation_heads=5)
    with pytest.raises(ValueError, match="relations is empty"):
        minilm_loss(six, six, relations=[])
    with pytest.raises(ValueError, match="'querry'"):
        minilm_loss(six, six, relations=[Relation("querry", "key")])
