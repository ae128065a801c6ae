"""Targets of token labels, from stored maps of the largest scores.

B batch, C classes, H and W rows and columns of a stored map, K scores kept at each of its places,
S tokens on a side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["StoredLabels", "crop_and_pool", "mixed_targets", "token_targets"]


class StoredLabels(NamedTuple):
    """What a stored tensor (B, 3, K, H, W) holds.

    Plane 0 are scores, plane 1 class numbers; the first row of plane 2 holds the random crop that
    the image was given, (x, y, width, height) as shares of it, and in column 5 the true class.
    """

    scores: Tensor
    classes: Tensor
    crops: Tensor
    truth: Tensor

    @classmethod
    def of(cls, stored: Tensor) -> StoredLabels:
        """Take a stored tensor apart; crops become (B, 4): left, top, right, bottom.

        Raises:
            ValueError: the tensor has other axes, or rows too short for crop and class.
        """
        if stored.ndim != 5 or stored.shape[1] != 3 or stored.shape[4] < 6:
            raise ValueError(
                f"stored labels {tuple(stored.shape)} must be (batch, 3, K, rows, columns) with "
                "at least 6 columns"
            )
        first = stored[:, 2, 0, 0]
        crops = torch.cat((first[:, :2], first[:, :2] + first[:, 2:4]), 1)
        return cls(stored[:, 0], stored[:, 1].long(), crops, first[:, 5].long())


def crop_and_pool(maps: Tensor, crops: Tensor, size: int) -> Tensor:
    """Return RoIAlign (B, C, S, S) of one crop of each map (B, C, H, W).

    Means of bilinear samples, ceil(side / S) on each side of a cell; a product of one matrix for
    rows and one for columns. Samples more than one place beyond the map are zero. A crop is at
    least one place wide. As in the official code, both axes are scaled by the map's width.

    Args:
        maps: (B, C, H, W).
        crops: (B, 4) left, top, right, bottom as shares of the map.
        size: S.
    """
    scaled = crops.float() * maps.shape[3] - 0.5
    rows = _sampling(scaled[:, 1], scaled[:, 3], maps.shape[2], size)
    columns = _sampling(scaled[:, 0], scaled[:, 2], maps.shape[3], size)
    return torch.einsum("bsh,bchw,btw->bcst", rows, maps.float(), columns)


def _sampling(low: Tensor, high: Tensor, side: int, size: int) -> Tensor:
    """Return what each of S cells takes of each of ``side`` places (B, S, side)."""
    found = low.new_zeros(len(low), size, side)
    for b, (start, end) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        # In float32 as the operator has it: the number of samples jumps at whole cells.
        length = torch.tensor(end - start, dtype=torch.float32).clamp(min=1.0)
        cell = length / size
        count = int(torch.ceil(cell))
        samples = (torch.arange(count, dtype=torch.float32) + 0.5) * cell / count
        at = start + torch.arange(size)[:, None] * cell + samples  # (S, count)
        inside = (at >= -1) & (at <= side)
        at = at.clamp(0, side - 1)
        below = at.floor().long()
        share = at - below
        for places, weight in ((below, 1 - share), ((below + 1).clamp(max=side - 1), share)):
            found[b].scatter_add_(1, places.to(found.device), (weight * inside / count).to(found))
    return found


def token_targets(
    stored: Tensor, num_classes: int, size: int, *, on: float = 1.0, off: float = 0.0
) -> Tensor:
    """Return targets (B, C, 2 + S²), or (B, C, 2) for S = 1: truth, class label, token labels.

    The scores are spread over a map of all classes, where absent ones are zero (they keep some
    probability), cropped and pooled as the image was, and only then made probabilities.

    Args:
        stored: (B, 3, K, H, W), see :class:`StoredLabels`.
        num_classes: C.
        size: S, the image's side / 16.
        on, off: a one-hot entry becomes ``on`` or ``off``; a probability p becomes on p + off.

    Raises:
        ValueError: the stored tensor has other axes, or a class that does not exist.

    Example:
        >>> token_targets(torch.zeros(2, 3, 5, 18, 18), 1000, 14).shape
        torch.Size([2, 1000, 198])
    """
    labels = StoredLabels.of(stored)
    for name, found in (("stored", labels.classes), ("true", labels.truth)):
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < num_classes:
            raise ValueError(
                f"{name} classes reach from {int(found.min())} to {int(found.max())}, "
                f"num_classes is {num_classes}"
            )
    batch, _, height, width = labels.scores.shape
    maps = labels.scores.new_zeros(batch, num_classes, height, width)
    maps.scatter_(1, labels.classes, labels.scores)

    def soft(side: int) -> Tensor:
        return on * crop_and_pool(maps, labels.crops, side).softmax(1).flatten(2) + off

    truth = F.one_hot(labels.truth, num_classes).to(maps) * (on - off) + off
    parts = [truth[:, :, None], soft(1)]
    return torch.cat([*parts, soft(size)] if size > 1 else parts, 2)


def mixed_targets(
    stored: Tensor,
    num_classes: int,
    size: int,
    *,
    kept: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    """Return :func:`token_targets` with smoothing, mixed with the batch in reverse (Mixup).

    Args:
        stored, num_classes, size: as there.
        kept: share of an image's own targets.
        smoothing: spread evenly over all classes.
    """
    off = smoothing / num_classes
    target = token_targets(stored, num_classes, size, on=1 - smoothing + off, off=off)
    return kept * target + (1 - kept) * target.flip(0)
