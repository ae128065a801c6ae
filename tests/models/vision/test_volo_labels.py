"""Token labels: losses by hand, RoIAlign against torchvision's, what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from compare import assert_close
from manyheads.models.vision.volo import mixed_targets, token_label_loss, token_targets
from manyheads.models.vision.volo.losses import blend_ground_truth, soft_target_loss
from manyheads.models.vision.volo.targets import crop_and_pool


def _logits(batch: int = 3, tokens: int = 6, classes: int = 5) -> tuple[torch.Tensor, ...]:
    cls = torch.randn(batch, classes, dtype=torch.float64)
    aux = torch.randn(batch, tokens, classes, dtype=torch.float64)
    target = torch.rand(batch, classes, 2 + tokens, dtype=torch.float64).softmax(1)
    return cls, aux, target


def test_the_loss_written_out() -> None:
    cls, aux, target = _logits()
    kept = 1 - 2 / 6
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        label = kept * target[b, :, 1] + (1 - kept) * target[2 - b, :, 1]
        expected -= (label * cls[b].log_softmax(0)).sum() / 3
        for n in range(6):
            expected -= 0.5 * (target[b, :, 2 + n] * aux[b, n].log_softmax(0)).sum() / 18
    assert_close(token_label_loss(cls, aux, target, (0, 1, 2, 2)), expected, 1e-12)


def test_two_axes_stand_for_every_token() -> None:
    cls, aux, target = _logits()
    flat = target[:, :, 1]
    wide = flat[:, :, None].expand(-1, -1, 8)
    for truth in (False, True):
        assert_close(
            token_label_loss(cls, aux, flat, (0, 0, 1, 3), ground_truth=truth),
            token_label_loss(cls, aux, wide, (0, 0, 1, 3)),
            1e-12,
        )


def test_hard_labels_give_cross_entropy() -> None:
    logits, classes = torch.randn(7, 5), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    assert_close(
        soft_target_loss(logits, F.one_hot(classes, 5).float()),
        F.cross_entropy(logits, classes),
        1e-6,
    )


def test_ground_truth_weighs_less_where_it_disagrees() -> None:
    target = torch.zeros(2, 3, 2)
    target[:, 0, 0] = 1
    target[0, 0, 1] = target[1, 2, 1] = 1
    blended = blend_ground_truth(target)
    assert_close(blended, torch.tensor([[1.0, 0, 0], [0.1, 0, 0.9]]), 1e-6)


def test_shapes_that_do_not_fit() -> None:
    cls, aux, target = _logits()
    with pytest.raises(ValueError, match="5 token labels, the model 6"):
        token_label_loss(cls, aux, target[:, :, :-1])
    with pytest.raises(ValueError, match="must share"):
        token_label_loss(cls[:2], aux, target)
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        token_label_loss(cls, aux, target[:, :4, 0])
    with pytest.raises(ValueError, match="shape of the logits"):
        soft_target_loss(cls, target)
    with pytest.raises(ValueError, match="6 columns"):
        token_targets(torch.zeros(1, 3, 2, 5, 5), 3, 2)
    stored = torch.zeros(1, 3, 2, 6, 6)
    stored[0, 1] = 3
    with pytest.raises(ValueError, match="stored classes reach from 3 to 3"):
        token_targets(stored, 3, 2)


@pytest.mark.parametrize("size", [1, 3, 14])
@pytest.mark.parametrize("grid", [(9, 7), (18, 18)])
def test_pooling_is_roi_align(size, grid) -> None:
    ops = pytest.importorskip("torchvision.ops")
    maps = torch.randn(5, 4, *grid)
    crops = torch.tensor(
        [[0, 0, 1, 1], [0.1, 0.23, 0.71, 0.9], [0.5, 0.5, 0.51, 0.505], [-0.3, 0.4, 1.4, 2],
         [0.2, 0.9, 0.95, 1]]
    )  # fmt: skip
    boxes = torch.cat((torch.arange(5)[:, None], crops * grid[1] - 0.5), 1)
    expected = ops.roi_align(maps, boxes, (size, size))
    assert_close(crop_and_pool(maps, crops, size), expected, 1e-5)


def test_absent_classes_keep_some_probability() -> None:
    stored = torch.zeros(2, 3, 2, 6, 7)
    stored[:, 0] = 4
    stored[:, 1, 1] = 2
    stored[:, 2, 0, 0, 2:4] = 1
    stored[1, 2, 0, 0, 5] = 1
    target = token_targets(stored, 4, 3)
    assert target.shape == (2, 4, 11)
    assert target[:, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    share = torch.tensor([4.0, 0, 4, 0]).softmax(0)
    assert_close(target[:, :, 6], share.expand(2, 4), 1e-5)
    assert_close(target[:, :, 1:].sum(1), torch.ones(2, 10), 1e-6)
    mixed = mixed_targets(stored, 4, 3, kept=0.75, smoothing=0.2)
    assert_close(mixed[0, :, 0], torch.tensor([0.65, 0.25, 0.05, 0.05]), 1e-6)
