"""Training batches and evaluation of images, through timm's transforms.

B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manyheads.data.images import ImageSplit, open_image
from manyheads.data.seeding import epoch_indices
from manyheads.errors import require_extra
from manyheads.train.options import VisionOptions

__all__ = ["ImageBatches", "Images", "mixing", "read_description", "transform"]


class Images(NamedTuple):
    """``images`` (B, C, H, W) normalised; ``labels`` (B,) numbers, or (B, K) shares of classes."""

    images: Tensor
    labels: Tensor


def transform(options: VisionOptions, in_channels: int, *, training: bool) -> Any:
    """Return timm's transform of a PIL image to a normalised tensor (C, H, W)."""
    require_extra("timm", "vision", "manyheads train vision")
    from timm.data import create_transform

    size = options.image_size or 224
    mean, std = statistics(in_channels)
    if not training:
        return create_transform(
            (in_channels, size, size), interpolation="bicubic", mean=mean, std=std,
            crop_pct=options.crop, is_training=False,
        )  # fmt: skip
    return create_transform(
        (in_channels, size, size), is_training=True, mean=mean, std=std,
        interpolation="bicubic", scale=(options.least_area, 1.0),
        hflip=0.5 if options.flip else 0.0, color_jitter=0.0,
        auto_augment=None if options.augment == "none" else options.augment,
        re_prob=options.erase,
    )  # fmt: skip


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a run of ``train vision`` says of its images: classes, channels, sizes, ...

    Raises:
        ValueError: the folder holds no such run.
    """
    try:
        described = json.loads((folder / "data.json").read_text())
        if {"class_names", "in_channels", "image_size", "mean", "std", "crop"} <= set(described):
            return described
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(f"{str(folder)!r} holds no run of 'train vision': give the folder of one")


def statistics(in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation: ImageNet's for colour, 0.5 and 0.5 for grey."""
    from manyheads.models.vision.base import IMAGENET_MEAN, IMAGENET_STD

    return (IMAGENET_MEAN, IMAGENET_STD) if in_channels == 3 else ((0.5,), (0.5,))


def mixing(options: VisionOptions, num_classes: int) -> Any:
    """Return timm's mixup and cutmix, or None where neither is asked for."""
    if not (options.mixup or options.cutmix):
        return None
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=options.mixup, cutmix_alpha=options.cutmix, prob=1.0, switch_prob=0.5,
        mode="batch", label_smoothing=options.smoothing, num_classes=num_classes,
    )  # fmt: skip


class ImageBatches:
    """Endless training batches; batch k is a pure function of (seed, k, rank, world_size).

    Two processes with batch 4 see what one with batch 8 sees, but for pairs that are mixed.
    """

    def __init__(
        self,
        split: ImageSplit,
        make: Any,
        mix: Any,
        *,
        in_channels: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.split, self.make, self.mix, self.in_channels = split, make, mix, in_channels
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size

    def batch(self, step: int) -> Images:
        """Return batch ``step`` of this process."""
        index = epoch_indices(
            step, len(self.split), batch_size=self.batch_size, seed=self.seed, rank=self.rank,
            world_size=self.world_size,
        )  # fmt: skip
        first = (step * self.world_size + self.rank) * self.batch_size
        images = []
        for place, i in enumerate(index):
            # By the sample's number, so that it does not matter which process draws for it.
            with _drawing((self.seed, first + place)):
                images.append(self.make(open_image(self.split.images[i], self.in_channels)))
        x, labels = torch.stack(images), torch.from_numpy(self.split.labels[index])
        if self.mix is not None:
            with _drawing((self.seed, step, self.rank)):
                x, labels = self.mix(x, labels)
        return Images(x, labels)


@contextmanager
def _drawing(words: tuple[int, ...]) -> Iterator[None]:
    """Seed all three generators, that the transforms draw from, and put them back afterwards."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seeds = np.random.SeedSequence(words).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.manual_seed(seeds[2])
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
