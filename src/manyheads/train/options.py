"""The flags of the recipes. Importing this file imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from manyheads.config import Config

__all__ = [
    "GenerateOptions",
    "PredictOptions",
    "TrainOptions",
    "URPETaskOptions",
    "VisionOptions",
    "json_object",
]

# What may differ between the parts of one run: where it computes and what it shows, not what.
FREE = frozenset(
    (
        "out", "resume", "restart", "save_every", "tensorboard", "devices", "accelerator",
        "accumulate", "threads", "progress",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(Config):
    """What every recipe takes.

    Attributes:
        preset: sizes of what is not given: small takes minutes on two cores, smoke 20 seconds.
        out: folder of the run (default: runs/ and a name made from the options). The same command
          continues what it finds there.
        resume: continue the run in this folder with the options stored there.
        restart: delete the run in the folder and begin anew.
        steps: optimiser steps.
        batch_size: sequences of one optimiser step, over all processes and accumulated parts.
        accumulate: parts that the batch is computed in, one after the other; saves memory.
        learning_rate: at its peak.
        warmup: steps of linear warm-up (default: a twentieth of the steps).
        lr_floor: share of the peak that the cosine ends at.
        weight_decay: of AdamW, on the matrices of linear and convolution layers alone.
        clip: largest norm of the gradient; 0 does not clip.
        precision: bf16-mixed computes matrix products in bfloat16, weights stay float32.
        eval_every: steps between evaluations.
        save_every: steps between checkpoints (default: at every evaluation).
        log_every: steps that a row of metrics.csv is a mean of.
        tensorboard: also write TensorBoard events into the run's folder.
        seed: of weights, data order and dropout.
        devices: processes on this machine, each with one device or its share of the cores; under
          torchrun as many as that starts, on all machines.
        accelerator: what to compute on.
        threads: threads of each process (default: torch's own).
        progress: show progress on the terminal.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"smoke": {}}
    recipe: ClassVar[str] = ""

    preset: str = field(default="small", metadata={"choices": ("small", "smoke")})
    out: str | None = None
    resume: str | None = None
    restart: bool = False
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-3
    warmup: int | None = None
    lr_floor: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    precision: str = field(default="32-true", metadata={"choices": ("32-true", "bf16-mixed")})
    eval_every: int = 100
    save_every: int | None = None
    log_every: int = 10
    tensorboard: bool = False
    seed: int = 0
    devices: int = 1
    accelerator: str = field(default="auto", metadata={"choices": ("auto", "cpu", "cuda", "mps")})
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        for name, choices in _choices(type(self)).items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(map(str, choices))}"
                )
        for name, least in self._least().items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: give {least} or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: give more than 0")
        if not 0 <= self.lr_floor <= 1:
            raise ValueError(f"lr_floor is {self.lr_floor}: give a share from 0 to 1")

    def _least(self) -> dict[str, float]:
        ones = ("steps", "batch_size", "accumulate", "eval_every", "save_every", "log_every")
        least: dict[str, float] = dict.fromkeys((*ones, "devices", "threads"), 1)
        return least | dict.fromkeys(("warmup", "weight_decay", "clip", "seed"), 0)

    @classmethod
    def of_preset(cls, preset: str, **values: Any) -> Self:
        """Return the options of a preset with other values for the fields named."""
        return cls.from_dict({"preset": preset} | cls.presets.get(preset, {}) | values)

    def resolved(self) -> Self:
        """Return a copy with what follows from other options filled in: warmup and folder.

        Raises:
            ValueError: values that do not fit each other.
        """
        done = self if self.warmup is not None else self.replace(warmup=self.steps // 20)
        if (done.warmup or 0) > done.steps:
            raise ValueError(
                f"warmup {done.warmup} is longer than the run of {done.steps} steps: give less"
            )
        return done if done.out else done.replace(out=done.default_folder())

    def identity(self) -> dict[str, Any]:
        """Return what makes two commands the same run: all but where and how it is computed."""
        return {k: v for k, v in self.to_dict().items() if k not in FREE | {"preset"}}

    def default_folder(self) -> str:
        """Return runs/ and a name that tells runs of different options apart."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        words = "-".join(str(w) for w in (self.recipe, *self._title()) if w)
        return f"runs/{re.sub('[^A-Za-z0-9.]+', '-', words).strip('-')}-{digest[:6]}"

    def _title(self) -> tuple[str | None, ...]:
        return ()

    def command(self) -> str:
        """Return the command line of these options, without the folder."""
        words = ["manyheads", "train", self.recipe]
        usual = self.presets.get(self.preset, {})
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value == usual.get(f.name, f.default) or f.name in ("out", "resume", "restart"):
                continue
            flag = f.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)


def json_object(name: str, text: str) -> dict[str, Any]:
    """Read an option that is a JSON object, or raise ValueError with the option's name."""
    try:
        read = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} {text!r} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{name} {text!r} must be a JSON object, such as '{{}}'")
    return read


def _choices(options: type[Config]) -> dict[str, tuple[Any, ...]]:
    fields = dataclasses.fields(options)
    return {f.name: f.metadata["choices"] for f in fields if "choices" in f.metadata}


@dataclass(frozen=True, kw_only=True, slots=True)
class URPETaskOptions(TrainOptions):
    """Train the URPE encoder on what a relative bias alone cannot do.

    Attributes:
        task: pi, position identification: every place names itself; etp, even token prediction:
          the first half names the 2nd, 4th, ... token.
        multiplier: the elementwise multiplier that makes URPE of a relative bias; without it
          the model is the paper's baseline.
        words: ids that tokens are drawn from, and a few more.
        length: tokens a sequence.
        num_layers, embed_dim, num_heads, mlp_dim: sizes of the encoder.
        eval_samples: held-out sequences that accuracy is measured on.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 400, "batch_size": 16, "learning_rate": 5e-3, "eval_every": 50,
            "words": 50, "length": 16, "num_layers": 2, "embed_dim": 32, "num_heads": 4,
            "mlp_dim": 128, "eval_samples": 200,
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "urpe-tasks"

    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    task: str = field(default="pi", metadata={"choices": ("pi", "etp")})
    multiplier: bool = True
    words: int = 100
    length: int = 32
    num_layers: int = 2
    embed_dim: int = 64
    num_heads: int = 4
    mlp_dim: int = 256
    eval_samples: int = 500

    def _least(self) -> dict[str, float]:
        ones = ("length", "num_layers", "embed_dim", "num_heads", "mlp_dim", "eval_samples")
        return TrainOptions._least(self) | dict.fromkeys(ones, 1.0)

    def _title(self) -> tuple[str | None, ...]:
        return (self.task, None if self.multiplier else "bias-only")


_SMALL_MODEL = '{"depths": [1, 1, 2, 1], "embed_dims": [32, 64, 96, 128], "patch": [3, 2, 1]}'


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionOptions(TrainOptions):
    """Train a vision backbone on labelled images.

    Attributes:
        data: a folder with a folder of images for each class, or with train and val folders of
          such; builtin:digits (scikit-learn's) or builtin:emoji.
        test_fraction: share of each class that is held out where the data come without a split.
        bad: what to do with a file that is no image.
        model: a backbone by name.
        model_options: fields of its config that differ, as JSON (default: none, or a small model
          for small images where no model is named).
        weights: an official checkpoint to start from; a head of other classes is started anew.
        image_size: rows and columns that images are cropped and scaled to (default: 224, or 32
          where no model is named).
        crop: share of an image's side that evaluation crops.
        augment: timm's automatic augmentation, such as rand-m9-mstd0.5; none.
        least_area: least share of an image that a training crop shows.
        flip: mirror half of the training images.
        mixup, cutmix: strengths of mixing pairs of images; 0 for none.
        smoothing: of the labels.
        erase: probability of erasing a rectangle of a training image.
        ema: decay of the averaged weights that are judged and kept; 0 keeps the last ones.
        drop_path: rate of stochastic depth (default: the model's).
        teacher: folder of another run of train vision, on images of the same classes, to learn
          from beside the labels; models with two classifiers keep one for it.
        distillation: learn the teacher's likeliest class (hard) or its probabilities (soft).
        teacher_weight: share of the loss that is the teacher's.
        temperature: that soft logits are divided by.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {
            "steps": 60, "batch_size": 32, "eval_every": 30,
            "model_options": (
                '{"depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 40], "patch": [3, 2, 1]}'
            ),
        },
    }  # fmt: skip
    recipe: ClassVar[str] = "vision"

    steps: int = 2000
    batch_size: int = 64
    weight_decay: float = 0.05
    eval_every: int = 500
    data: str = "builtin:digits"
    test_fraction: float = 0.2
    bad: str = field(default="raise", metadata={"choices": ("raise", "skip")})
    model: str = "poolformer_s12"
    model_options: str | None = None
    weights: str | None = None
    image_size: int | None = None
    crop: float = 1.0
    augment: str = "none"
    least_area: float = 0.6
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1
    erase: float = 0.0
    ema: float = 0.0
    drop_path: float | None = None
    teacher: str | None = None
    distillation: str = field(default="hard", metadata={"choices": ("hard", "soft")})
    teacher_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        TrainOptions.__post_init__(self)
        if not 0 <= self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight is {self.teacher_weight}: give a share from 0 to 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: give a number above 0")
        for name in ("test_fraction", "crop", "least_area"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share above 0, up to 1")
        for name in ("smoothing", "erase", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give a share from 0 to below 1")
        self.read_model_options()

    def resolved(self) -> Self:
        """Return a copy with the model's options and the size of images filled in, and the rest."""
        small = self.model == "poolformer_s12" and not self.weights
        size = self.image_size or (32 if small else 224)
        options = self.model_options
        if options is None:
            options = _SMALL_MODEL if small and size <= 64 else "{}"
        return TrainOptions.resolved(self.replace(image_size=size, model_options=options))

    def _least(self) -> dict[str, float]:
        return TrainOptions._least(self) | {"image_size": 1, "mixup": 0, "cutmix": 0}

    def _title(self) -> tuple[str | None, ...]:
        return (self.model, self.data.rstrip("/").split("/")[-1].split(":")[-1])

    def read_model_options(self) -> dict[str, Any]:
        """Return ``model_options`` as a mapping.

        Raises:
            ValueError: no JSON object.
        """
        read = json_object("model_options", self.model_options or "{}")
        return {k: tuple(v) if isinstance(v, list) else v for k, v in read.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions(Config):
    """Name what images show, with a model that ``train vision`` made.

    Attributes:
        run: folder of a run of ``train vision``.
        images: image files, or folders of them.
        top_k: classes to name for each image.
        format: text, or csv or json for other programs.
        bad: what to do with a file that is no image.
        batch_size: images computed at once.
        threads: threads to compute with (default: torch's own).
    """

    run: str = field(metadata={"positional": True})
    images: tuple[str, ...] = field(metadata={"positional": True, "whole": True})
    top_k: int = 5
    format: str = field(default="text", metadata={"choices": ("text", "csv", "json")})
    bad: str = field(default="raise", metadata={"choices": ("raise", "skip")})
    batch_size: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name, choices in _choices(type(self)).items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateOptions(Config):
    """Continue a prompt with a language model, token by token as they come.

    Attributes:
        run: folder of a run of ``train lm``.
        prompt: text to continue; - reads it from the standard input.
        max_new_tokens: stop after this many; 0 goes on until Ctrl-C.
        temperature: 0 takes the likeliest token, 1 draws as the model says.
        top_k: draw among the k likeliest.
        top_p: draw among the likeliest that make up this probability.
        stop: end before this text appears; give it several times for several texts. Backslash
          escapes (\\n, \\t) are read.
        seed: of the draws.
        echo: print the prompt as well.
        threads: threads to compute with (default: torch's own).
    """

    run: str = field(metadata={"positional": True})
    prompt: str
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = field(default=(), metadata={"whole": True})
    seed: int = 0
    echo: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give 0 (endless) or more")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}: give 1 or more")
