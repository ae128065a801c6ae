"""Backbones with two classifiers: one learns from labels, one from a teacher (2012.12877).

B batch, C channels. In use the two are averaged; in training they are apart only on request.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from manyheads.models.vision.base import VisionModel

__all__ = ["TwoHeadModel"]


class TwoHeadModel(VisionModel):
    """Base of backbones with the classifiers ``head`` and ``head_dist``.

    A model fills ``iter_stages``, ``finish`` and ``pool``, and calls ``make_heads`` when its
    sizes are known. Modules that can fold weights for inference have a method ``fold()``.

    Attributes:
        distilled_training: see :meth:`set_distilled_training`.
    """

    distilled_training: bool = False
    first_conv: ClassVar[str] = "stem.0.conv"

    def make_heads(self) -> None:
        """Make the classifiers that ``config.distillation`` asks for."""
        self.classifier_names = ("head", "head_dist") if self.config.distillation else ("head",)
        for name in self.classifier_names:
            setattr(self, name, self.make_classifier(self.num_classes))

    @abstractmethod
    def pool(self, x: Any) -> Tensor:
        """Return what the classifiers read (B, C) of what ``forward_features`` returns."""

    def set_distilled_training(self, enable: bool = True) -> None:
        """Return (logits, logits for the teacher) in training instead of their mean.

        Raises:
            ValueError: the model was built with ``distillation=False``: it has one classifier.
        """
        if enable and not self.config.distillation:
            raise ValueError(
                "the model has one classifier: build it with distillation=True to train with a "
                "teacher"
            )
        self.distilled_training = enable

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        """Return logits (B, classes), or pooled features (B, C) with ``pre_logits``.

        After :meth:`set_distilled_training`, in training, a pair of logits.
        """
        pooled = self.pool(x)
        if pre_logits:
            return pooled
        logits = [self.get_submodule(name)(pooled) for name in self.classifier_names]
        if len(logits) == 1:
            return logits[0]
        if self.distilled_training and self.training:
            return logits[0], logits[1]
        return (logits[0] + logits[1]) / 2

    def get_classifier(self) -> Any:
        """Return the classifier, or both as a tuple."""
        heads = tuple(self.get_submodule(name) for name in self.classifier_names)
        return heads if len(heads) > 1 else heads[0]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        names = self.classifier_names
        return super().pretrained_cfg | {"classifier": names if len(names) > 1 else names[0]}

    default_cfg = pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return super().group_matcher(coarse) | {"stem": r"^stem"}

    def fuse(self) -> Self:
        """Return a copy for inference: norms and layer scales folded into convolutions.

        Equal up to rounding, with no batch norm left. Maps are channels-last inside, the layout in
        which 1 x 1 convolutions are fastest on a CPU; images may come in either.
        """
        fused = copy.deepcopy(self).eval().to(memory_format=torch.channels_last)
        for module in list(fused.modules()):
            fold: Callable[[], None] | None = getattr(module, "fold", None)
            if fold is not None:
                fold()
        return fused.requires_grad_(False)
