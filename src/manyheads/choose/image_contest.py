"""Small MetaFormers that differ in their token mixers alone, on labelled images.

B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.choose.contest import Contest
from manyheads.choose.race import Figure
from manyheads.choose.results import Results
from manyheads.data.images import ImageData, ImageSplit, open_image
from manyheads.data.seeding import epoch_indices, generator
from manyheads.models.vision.metaformer import MetaFormer, MetaFormerConfig

__all__ = ["image_contest", "small_metaformer"]

_SIDE = 32
# Patches do not overlap, so that places tell each other something by their mixers alone.
SMALL = MetaFormerConfig(
    depths=(2, 2), embed_dims=(32, 64), mlp_ratios=(2, 2), patch=(4, 4, 0), down=(2, 2, 0),
    positions=0, image_size=_SIDE, norm="channel", layer_scale=None,
)  # fmt: skip
_BATCH = 64
# Of 32 x 32 in colour these are 270 MB in memory; what is beyond them is not read.
_MOST_TRAINING, _MOST_HELD_OUT = 20_000, 2_000


def small_metaformer(mixer: str, *, num_classes: int, in_channels: int) -> MetaFormer:
    """Build the small model of a candidate: two stages, of 8 x 8 and 4 x 4 places.

    Raises:
        ValueError: the mixer cannot take these maps.
    """
    return MetaFormer(SMALL.replace(mixers=mixer, num_classes=num_classes, in_channels=in_channels))


def image_contest(results: Results) -> Contest:
    """Classification of the workload's images: accuracy on held-out ones, without augmentation."""
    data, seed = results.source, results.workload.seed
    assert isinstance(data, ImageData)
    x, labels = _tensors(data, data.train, _MOST_TRAINING, seed)
    held_out, truth = _tensors(data, data.test, _MOST_HELD_OUT, seed)

    def loss(model: nn.Module, step: int) -> Tensor:
        index = epoch_indices(step, len(x), batch_size=_BATCH, seed=seed)
        return F.cross_entropy(model(x[index]), labels[index], label_smoothing=0.1)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> Figure:
        right = sum(
            int((model(images).argmax(-1) == classes).sum())
            for images, classes in zip(held_out.split(256), truth.split(256), strict=True)
        )
        share, count = right / len(truth), len(truth)
        return Figure(share, 1.96 * math.sqrt(max(share * (1 - share), 1 / count) / count))

    return Contest(
        task="images",
        metric="accuracy",
        build=lambda mixer: small_metaformer(
            mixer, num_classes=len(data.class_names), in_channels=data.in_channels
        ),
        loss=loss,
        evaluate=evaluate,
        tokens_a_step=_BATCH,
        chance=float(truth.bincount().max() / len(truth)),
        length=0,
        details={"training_images": len(x), "held_out_images": len(truth)} | SMALL.to_dict(),
    )


def _tensors(data: ImageData, split: ImageSplit, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) from -1 to 1, at the small model's size, and their classes."""
    from PIL import Image, ImageOps

    index = np.arange(len(split))
    if len(index) > most:
        index = np.sort(generator(seed).choice(index, most, replace=False))
    images = []
    for i in index.tolist():
        image = open_image(split.images[i], data.in_channels)
        fitted = np.asarray(ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.BICUBIC))
        images.append(torch.from_numpy(fitted.copy()).view(_SIDE, _SIDE, -1).permute(2, 0, 1))
    return torch.stack(images) / 127.5 - 1.0, torch.from_numpy(split.labels[index])
