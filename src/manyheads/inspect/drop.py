"""The verb ``inspect drop``: which patches of an image a model with interpreters keeps.

B batch, C channels, H and W rows and columns, D groups.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.config import Config

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = ["DropOptions", "drop_picture", "heat_colours", "run"]

# From what is not looked at to what is; told apart in grey and with any colour vision.
_COLOURS = ((0, (38, 20, 82)), (0.35, (49, 104, 142)), (0.7, (53, 183, 121)), (1, (253, 231, 37)))
_GONE = 0.15  # brightness that is left of a dropped patch
_IMAGE_SHARE = 0.6
_LEAST_SIDE = 224
_GAP = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class DropOptions(Config):
    """Draw an image, its heat map, and what is left of it behind each interpreter.

    Attributes:
        image: the image file.
        run: folder of a run of ``train ia-red2``, instead of ``model`` and ``weights``.
        model: a model with interpreters by name.
        weights: its checkpoint, in the released layout.
        out: the PNG to write; "none" prints the figures alone.
        group: interpreter that the heat map is of, from 1 (default: the second, as in the paper).
        size: rows and columns that the image is scaled and cropped to (default: the model's).
    """

    image: str = field(metadata={"positional": True})
    run: str | None = None
    model: str | None = None
    weights: str | None = None
    out: str = "drop.png"
    group: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.run is not None and (self.model or self.weights):
            raise ValueError("give --run, or --model and --weights, not both")
        if self.run is None and not (self.model and self.weights):
            raise ValueError(
                "what to look with? Give --run FOLDER of 'train ia-red2', or --model NAME and "
                "--weights FILE: interpreters that were not trained keep everything"
            )


def run(options: DropOptions) -> int:
    """Print what is kept in front of each group, and write the picture.

    Raises:
        ValueError: no such image, model, weights or group, or a file that cannot be written.
        MissingExtraError: the extra ``vision`` is not installed.
    """
    import torch

    from manyheads.data.images import open_image
    from manyheads.errors import require_extra

    require_extra("timm", "vision", "manyheads inspect drop")
    from timm.data import create_transform

    model, described = _model(options)
    channels, side = described["in_channels"], options.size or described["image_size"]
    mean, std = tuple(described["mean"]), tuple(described["std"])
    if not Path(options.image).is_file():
        raise ValueError(f"no image at {options.image!r}: give an image file")
    make = create_transform(
        (channels, side, side), interpolation="bicubic", mean=mean, std=std,
        crop_pct=described["crop"], is_training=False,
    )  # fmt: skip
    x = make(open_image(Path(options.image), channels))[None]
    count = len(model.depths)
    if options.group is not None and not 1 <= options.group <= count:
        raise ValueError(f"group {options.group} does not exist: the model has 1 to {count}")
    group = None if options.group is None else options.group - 1
    with torch.no_grad():
        out = model.look(x)
        heat = model.heat_map(x, group=group)[0]
    if options.out != "none":
        pixels = x[0] * x.new_tensor(std)[:, None, None] + x.new_tensor(mean)[:, None, None]
        kept = [p[0, model.prefix :].view(heat.shape) for p in out.policies]
        try:
            Path(options.out).parent.mkdir(parents=True, exist_ok=True)
            drop_picture(pixels.clamp(0, 1), heat, kept).save(options.out)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"out {options.out!r} cannot be written ({error}): give another file with --out"
            ) from None
    total = heat.numel()
    for i, policy in enumerate(out.policies):
        count = int(policy[0, model.prefix :].sum())
        print(f"group {i + 1}: {count} of {total} patches kept ({count / total:.0%})")
    print(f"work left in the blocks, counted by tokens: {float(out.cost[0]):.0%}")
    best = int(out.logits[0].argmax())
    names = described["class_names"]
    share = float(out.logits[0].softmax(-1)[best])
    print(f"answer: {names[best] if names else f'class {best}'} ({share:.1%})")
    if options.out != "none":
        print(f"written: {options.out}")
    return 0


def _model(options: DropOptions) -> tuple[Any, dict[str, Any]]:
    """Return the model in eval mode, and what its images are like."""
    from manyheads.models.base import create_model, get_variant, load_model
    from manyheads.models.vision.base import VisionModel
    from manyheads.models.vision.ia_red2 import Dropping

    if options.run is None:
        assert options.model is not None
        kind = get_variant(options.model).model
        if not (issubclass(kind, Dropping) and issubclass(kind, VisionModel)):
            raise ValueError(
                f"model {options.model!r} has no interpreters for images: take "
                "ia_red2_deit_small or ia_red2_deit_base"
            )
        model = create_model(options.model, weights=options.weights).eval()
        cfg = model.pretrained_cfg
        channels, side, _ = cfg["input_size"]
        return model, {
            "in_channels": channels, "image_size": side, "crop": cfg["crop_pct"],
            "mean": cfg["mean"], "std": cfg["std"], "class_names": None,
        }  # fmt: skip
    folder = Path(options.run)
    try:
        described = json.loads((folder / "data.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{str(folder)!r} holds no run of 'train ia-red2': give the folder of one"
        ) from None
    trained: Any = load_model(folder)
    if not isinstance(trained, Dropping):
        raise ValueError(
            f"the model in {str(folder)!r} has no interpreters: train one with 'train ia-red2'"
        )
    return trained.eval(), described


def drop_picture(image: Tensor, heat: Tensor, kept: list[Tensor]) -> Any:
    """Return a PIL image: the image, the heat map over it, and what each group keeps.

    Args:
        image: (C, H, W) in [0, 1], one or three channels.
        heat: (rows, columns) in [0, 1].
        kept: bool (rows, columns) for each group.
    """
    import numpy as np
    from PIL import Image

    from manyheads.layers.grid import resize_map

    pixels = image.expand(3, -1, -1)
    factor = max(1, -(-_LEAST_SIDE // min(pixels.shape[1:])))
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    size = (pixels.shape[1], pixels.shape[2])
    smooth = resize_map(heat[None, None].float(), size)[0, 0].clamp(0, 1)
    base = pixels.permute(1, 2, 0).float().cpu().numpy() * 255
    coloured = heat_colours(smooth.cpu().numpy())
    panels = [base, _IMAGE_SHARE * base + (1 - _IMAGE_SHARE) * coloured]
    for one in kept:
        rows, columns = one.shape
        light = one.float().clamp_min(_GONE)
        light = light.repeat_interleave(-(-size[0] // rows), 0)[: size[0]]
        light = light.repeat_interleave(-(-size[1] // columns), 1)[:, : size[1]]
        panels.append(base * light[..., None].cpu().numpy())
    gap = np.full((size[0], _GAP, 3), 255.0)
    strip = [part for panel in panels for part in (panel, gap)][:-1]
    return Image.fromarray(np.concatenate(strip, 1).round().astype(np.uint8))


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) from 0 to 255 of values in [0, 1]."""
    import numpy as np

    places = [p for p, _ in _COLOURS]
    channels = [np.interp(values, places, [c[i] for _, c in _COLOURS]) for i in range(3)]
    return np.stack(channels, -1)
