"""What every vision backbone shares: the surface that timm's users know.

B batch, C channels, H and W rows and columns of an image or a map, S stages.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from manyheads.models.base import Model
from manyheads.models.vision.features import FeatureInfo, indices_of

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "FeatureMaps",
    "VisionModel",
    "check_images",
    "run_blocks",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_images(x: Tensor, in_channels: int, *, least: int = 1) -> None:
    """Check a batch of images (B, C, H, W).

    Raises:
        ValueError: the number of axes, channels, rows or columns is not possible.
    """
    if torch.compiler.is_compiling():
        return
    if x.ndim != 4:
        raise ValueError(
            f"images have {x.ndim} axes {tuple(x.shape)}, expected (batch, channels, height, "
            "width): add the batch with images[None]"
        )
    if x.shape[1] != in_channels:
        raise ValueError(
            f"images have {x.shape[1]} channels, the model reads {in_channels}: convert them, or "
            f"build the model with in_channels={x.shape[1]}"
        )
    for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
        if size < least:
            raise ValueError(f"{name} {size} is below {least}, the least that the model takes")


def run_blocks(
    blocks: Sequence[Callable[[Any], Any]] | nn.Module, x: Any, *, checkpointing: bool
) -> Any:
    """Apply blocks in turn; with ``checkpointing`` their insides are computed again backward."""
    for block in cast(Iterator[Callable[[Any], Any]], blocks):
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


class VisionModel(Model):
    """Base of vision backbones.

    A model fills ``iter_stages``, ``finish``, ``forward_head`` and sets ``num_features``,
    ``feature_info`` and the attribute that ``classifier_names`` names; the rest follows.

    Attributes:
        num_classes: of the head; 0 without one.
        num_features: channels of what ``forward_features`` returns.
        feature_info: a dict for each stage: ``num_chs``, ``reduction`` (stride), ``module``.
        grad_checkpointing: see :meth:`set_grad_checkpointing`.
    """

    num_classes: int
    num_features: int
    feature_info: list[dict[str, Any]]
    grad_checkpointing: bool = False
    classifier_names: tuple[str, ...] = ("head",)
    first_conv: ClassVar[str] = "stem"
    crop_pct: ClassVar[float] = 0.9
    mean: ClassVar[tuple[float, float, float]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, float, float]] = IMAGENET_STD

    @abstractmethod
    def iter_stages(self, x: Tensor) -> Iterator[Any]:
        """Yield what each stage passes on to the next, of images (B, C, H, W)."""

    def as_map(self, x: Any) -> Tensor:
        """Return what a stage yields as a map (B, C, H, W)."""
        return x

    @abstractmethod
    def finish(self, x: Any) -> Any:
        """Turn what the last stage yields into what ``forward_features`` returns."""

    @abstractmethod
    def forward_head(self, x: Any, pre_logits: bool = False) -> Tensor:
        """Return logits (B, classes), or pooled features (B, C) with ``pre_logits``."""

    def forward_features(self, x: Tensor) -> Any:
        """Return the features before pooling, of images (B, C, H, W)."""
        check_images(x, self.config.in_channels)
        for out in self.iter_stages(x):
            last = out
        return self.finish(last)

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, classes) of images (B, C, H, W)."""
        return self.forward_head(self.forward_features(x))

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features

    def normalise_map(self, x: Tensor, index: int) -> Tensor:
        """Return a stage's map with the model's last norm, where it fits; stage ``index``."""
        if index == len(self.feature_info) - 1:
            finished = self.finish(x)
            return finished if isinstance(finished, Tensor) and finished.ndim == 4 else x
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps of stages, and the last features.

        Args:
            x: images (B, C, H, W).
            indices: stages to return (negative from the end), a number for the last so many, or
                None for all.
            norm: apply the model's last norm to the last stage's map.
            stop_early: do not compute stages behind the last index; then only maps are returned.
            output_fmt: "NCHW" or "NHWC" (timm's "NLC" where tokens are asked for).
            intermediates_only: return the maps alone.

        Returns:
            The maps in the order of the stages, or (features, maps).

        Raises:
            ValueError: an index that no stage has, an unknown format, or ``stop_early`` without
                ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NHWC", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be 'NCHW', 'NHWC' or 'NLC'")
        if stop_early and not intermediates_only:
            raise ValueError("stop_early leaves no last features: pass intermediates_only=True")
        check_images(x, self.config.in_channels)
        wanted = indices_of(indices, len(self.feature_info))
        maps: list[Tensor] = []
        out: Any = None
        for i, out in enumerate(self.iter_stages(x)):
            if i in wanted:
                one = self.as_map(out)
                maps.append(_laid_out(self.normalise_map(one, i) if norm else one, output_fmt))
            if stop_early and i == max(wanted):
                break
        return maps if intermediates_only else (self.finish(out), maps)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: blocks are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.get_submodule(self.classifier_names[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for so many classes; 0: features come out.

        Raises:
            ValueError: a negative number, or a pooling that the model does not have.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes {num_classes} must not be negative")
        if global_pool not in (None, "", "avg"):
            raise ValueError(f"global_pool {global_pool!r}: the model pools by 'avg'")
        self.num_classes = num_classes
        self.config = self.config.replace(num_classes=num_classes)
        for name in self.classifier_names:
            old = self.get_submodule(name)
            like = next((p for p in old.parameters()), next(self.parameters()))
            new = self.make_classifier(num_classes)
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, new.to(like))

    def make_classifier(self, num_classes: int) -> nn.Module:
        """Return a new classifier on ``head_hidden_size`` channels."""
        if not num_classes:
            return nn.Identity()
        linear = nn.Linear(self.head_hidden_size, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        return linear

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters that weight decay should leave alone beside norms, biases."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions of the stem and of the blocks, for layer-wise decay."""
        if coarse:
            return {"stem": rf"^{self.first_conv}", "blocks": r"^stages\.(\d+)"}
        return {
            "stem": rf"^{self.first_conv}",
            "blocks": [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^(?:norm|head)", (99999,))],
        }

    def fuse(self) -> Self:
        """Return a copy for inference alone: the same outputs up to rounding, fewer operators."""
        raise ValueError(f"{type(self).__name__} has no fused form")

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm's data pipeline asks of a model: sizes, mean, std, names of first and last."""
        c = self.config
        size = getattr(c, "image_size", 224)
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return {
            "input_size": (c.in_channels, rows, columns),
            "num_classes": self.num_classes,
            "crop_pct": self.crop_pct,
            "interpolation": "bicubic",
            "mean": self.mean,
            "std": self.std,
            "first_conv": self.first_conv,
            "classifier": self.classifier_names[0],
            "fixed_input_size": False,
        }

    default_cfg = pretrained_cfg


class FeatureMaps(nn.Module):
    """A backbone that returns the maps of some stages: ``create_model(..., features_only=True)``.

    Args:
        model: the backbone; its head is dropped.
        out_indices: stages to return, negative from the end; None: all.

    Attributes:
        feature_info: a :class:`FeatureInfo` of the maps that are returned.
    """

    def __init__(self, model: VisionModel, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        places = indices_of(out_indices, len(model.feature_info))
        self.out_indices = tuple(places)
        self.feature_info = FeatureInfo([model.feature_info[i] for i in places])
        model.reset_classifier(0)
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps (B, C_i, H_i, W_i) of images (B, C, H, W)."""
        return self.model.forward_intermediates(
            x, self.out_indices, stop_early=True, intermediates_only=True
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See :meth:`VisionModel.set_grad_checkpointing`."""
        self.model.set_grad_checkpointing(enable)


def _laid_out(x: Tensor, output_fmt: str) -> Tensor:
    if output_fmt == "NHWC":
        return x.permute(0, 2, 3, 1)
    return x.flatten(2).mT if output_fmt == "NLC" else x
