"""Train a backbone on labelled images, measured by accuracy on all held-out images.

B batch, C channels, H and W rows and columns, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data.images import ImageData, ImageSplit, load_images, open_image
from manyheads.models.base import create_model, get_variant, load_model
from manyheads.models.vision.base import VisionModel
from manyheads.models.vision.two_heads import TwoHeadModel
from manyheads.train.distillation import distillation_loss
from manyheads.train.files import write_json
from manyheads.train.launch import launch
from manyheads.train.loop import (
    Batches,
    evaluating,
    fit,
    load_kept,
    open_folder,
    part_size,
    seed_process,
    sum_over_processes,
)
from manyheads.train.options import VisionOptions
from manyheads.train.report import results
from manyheads.train.stop import StopRequest
from manyheads.train.vision_data import (
    ImageBatches,
    Images,
    mixing,
    read_description,
    statistics,
    transform,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Prepared", "Procedure", "VisionOptions", "accuracy", "prepare", "run", "train"]


class Prepared(NamedTuple):
    """What is read before any work."""

    data: ImageData
    changes: dict[str, Any]
    teacher_size: int | None = None


def run(options: VisionOptions) -> int:
    """Do ``manyheads train vision``; returns the exit code."""
    return launch(options, prepare, train)


def prepare(options: VisionOptions) -> Prepared:
    """Read the images' names and build the model without memory, so that errors come first."""
    data = load_images(
        options.data,
        test_fraction=options.test_fraction,
        seed=options.seed,
        bad=options.bad,  # type: ignore[arg-type]
    )
    variant = get_variant(options.model)
    if not issubclass(variant.model, VisionModel):
        raise ValueError(f"model {options.model!r} is no vision backbone: see list_models()")
    changes = options.read_model_options() | {
        "num_classes": len(data.class_names), "in_channels": data.in_channels,
    }  # fmt: skip
    if "image_size" in variant.config.to_dict() and "image_size" not in changes:
        changes["image_size"] = options.image_size or 224
    if "drop_path" in variant.config.to_dict() and options.drop_path is not None:
        changes["drop_path"] = options.drop_path
    with torch.no_grad():
        model = create_model(options.model, device="meta", **changes)
        size = options.image_size or 224
        model.eval()(torch.empty(1, data.in_channels, size, size, device="meta"))
    if options.mixup or options.cutmix:
        part = options.batch_size // (options.devices * options.accumulate)
        if part % 2:
            raise ValueError(
                f"mixup and cutmix pair images: {part} at once is odd, give an even one"
            )
    return Prepared(data, changes, teacher_size(options, data))


def teacher_size(options: VisionOptions, data: ImageData) -> int | None:
    """Return the side of the teacher's images, None without one, checked against these images.

    Raises:
        ValueError: no run there, or one on other classes or channels.
    """
    if options.teacher is None:
        return None
    described = read_description(Path(options.teacher))
    for key, ours in (("class_names", list(data.class_names)), ("in_channels", data.in_channels)):
        if described[key] != ours:
            raise ValueError(
                f"teacher {options.teacher!r} has {key} {described[key]}, the images {ours}: "
                "train it on images of the same classes"
            )
    return described["image_size"]


class Procedure(Protocol):
    """What a recipe of its own does otherwise than this one: see ``train ia-red2``."""

    def begin(self, model: Any) -> None:
        """Prepare the model, before its optimizer is made."""

    def batches(self, batches: Batches) -> Batches:
        """Return batches that ``loss`` understands."""

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""

    def figures(
        self,
        fabric: Fabric,
        model: Any,
        split: ImageSplit,
        in_channels: int,
        make: Any,
        stop: StopRequest,
    ) -> dict[str, float]:
        """Return further figures of the held-out images, as many calls as on other processes."""


def train(
    fabric: Fabric,
    options: VisionOptions,
    prepared: Prepared,
    stop: StopRequest,
    *,
    procedure: Procedure | None = None,
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    data, changes, side = prepared
    with open_folder(fabric, options, {"sha256": data.sha256}) as folder:
        # Set up.
        if fabric.is_global_zero:
            write_json(folder.path / "data.json", describe(options, data))
        torch.manual_seed(options.seed)
        model = create_model(options.model, **changes)
        if options.weights:
            fine_tune(model, options.weights, len(data.class_names))
        if procedure is not None:
            procedure.begin(model)
        teacher = None
        if side is not None:
            teacher = load_teacher(options, side).to(fabric.device)
            if isinstance(model, TwoHeadModel) and model.config.distillation:
                model.set_distilled_training()
        shadow = copy.deepcopy(model) if options.ema else None
        seed_process(fabric, options.seed)
        batches: Batches = ImageBatches(
            data.train,
            transform(options, data.in_channels, training=True),
            mixing(options, len(data.class_names)),
            in_channels=data.in_channels,
            batch_size=part_size(fabric, options),
            seed=options.seed,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )
        objective: Callable[[nn.Module, Any], Tensor] = partial(
            loss, options=options, teacher=teacher
        )
        if procedure is not None:
            batches, objective = procedure.batches(batches), procedure.loss
        still = transform(options, data.in_channels, training=False)
        judged = model if shadow is None else shadow

        # Fit. On the way a part of the training images is looked at, the held-out ones are not.
        part = data.train.take(range(0, len(data.train), max(1, len(data.train) // 500)))

        def evaluate() -> dict[str, float]:
            right, count = accuracy(fabric, judged, part, data.in_channels, still, options, stop)
            return {"training_accuracy": right / count}

        at = fit(
            fabric,
            options,
            folder,
            stop,
            model,
            batches,
            loss=objective,
            evaluate=evaluate,
            figures=("training_accuracy",),
            unit=("images", options.batch_size),
            shadow=shadow,
            decay=options.ema,
        )

        # Evaluate the weights that were kept on all held-out images.
        load_kept(folder, model)
        model.to(fabric.device)
        right, count = accuracy(fabric, model, data.test, data.in_channels, still, options, stop)
        more = (
            {}
            if procedure is None
            else procedure.figures(fabric, model, data.test, data.in_channels, still, stop)
        )
        found = results(
            options,
            title=f"{options.recipe} {options.model}, {model.num_parameters():,} parameters, on "
            f"{data.name} ({len(data.train)} training and {count} held-out images at "
            f"{options.image_size} px, {len(data.class_names)} classes)",
            figures={
                "test_accuracy": right / count,
                "right": right,
                "test_images": count,
                "skipped_files": len(data.skipped),
                "epochs": options.steps * options.batch_size / len(data.train),
                "seconds": at.seconds,
            }
            | more,
            hint=f"manyheads predict {folder.path} IMAGES",
            sha256=data.sha256,
            parameters=model.num_parameters(),
            model=model.config.to_dict(),
        )
        if fabric.is_global_zero:
            write_json(folder.results, found)
        return found


def describe(options: VisionOptions, data: ImageData) -> dict[str, Any]:
    """Return what is needed to put other images through the model."""
    mean, std = statistics(data.in_channels)
    return {
        "name": data.name,
        "class_names": list(data.class_names),
        "in_channels": data.in_channels,
        "image_size": options.image_size,
        "crop": options.crop,
        "mean": list(mean),
        "std": list(std),
    }


def fine_tune(model: Any, weights: Any, num_classes: int) -> None:
    """Load a checkpoint of the published classes, then start a new head if theirs differ."""
    from manyheads.layers.keymap import read_weights

    read = read_weights(weights)
    heads = {t.shape[0] for n, t in read.items() if n.split(".")[0] in ("head", "fc", "aux_head")
             and t.ndim > 1}  # fmt: skip
    classes = heads.pop() if len(heads) == 1 else num_classes
    if classes != num_classes:
        model.reset_classifier(classes)
    model.load_official(read)
    if classes != num_classes:
        model.reset_classifier(num_classes)


class Teacher(nn.Module):
    """A trained model that reads the student's images, at its own size, without gradients."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model.eval().requires_grad_(False), (size, size)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, C, H, W)."""
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return self.model(images)


def load_teacher(options: VisionOptions, size: int) -> Teacher:
    """Return the model of the run that ``--teacher`` names."""
    return Teacher(load_model(str(options.teacher)), size)


def loss(
    module: nn.Module, batch: Images, *, options: VisionOptions, teacher: nn.Module | None = None
) -> Tensor:
    """Return the mean cross entropy, in nats, with the teacher's part; mixed labels are smooth."""
    logits = module(batch.images)
    if teacher is None:
        smoothing = 0.0 if batch.labels.ndim == 2 else options.smoothing
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=smoothing)
    # A model with one classifier learns from both with it.
    own, other = logits if isinstance(logits, tuple) else (logits, logits)
    return distillation_loss(
        (own.float(), other.float()),
        batch.labels,
        teacher(batch.images).float(),
        kind=options.distillation,  # type: ignore[arg-type]
        weight=options.teacher_weight,
        temperature=options.temperature,
        smoothing=options.smoothing,
    )


def accuracy(
    fabric: Fabric,
    model: nn.Module,
    split: ImageSplit,
    in_channels: int,
    make: Any,
    options: VisionOptions,
    stop: StopRequest,
) -> tuple[int, int]:
    """Return how many of the images are classified rightly, of how many: all of them."""
    own = range(fabric.global_rank, len(split), fabric.world_size)
    right, count = 0, 0
    with evaluating(fabric, model):
        for start in range(0, len(own), options.batch_size):
            stop.check()
            index = own[start : start + options.batch_size]
            x = torch.stack([make(open_image(split.images[i], in_channels)) for i in index])
            classes = model(fabric.to_device(x)).argmax(-1).cpu()
            right += int((classes == torch.from_numpy(split.labels[list(index)])).sum())
            count += len(index)
    right, count = (int(n) for n in sum_over_processes(fabric, right, count))
    return right, count
