"""The verb ``predict``: the likeliest classes of images, by a trained backbone."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from manyheads.data.images import SUFFIXES, open_image
from manyheads.errors import require_extra
from manyheads.models.base import load_model
from manyheads.train.options import PredictOptions
from manyheads.train.vision_data import read_description

__all__ = ["PredictOptions", "predict", "run"]


def run(options: PredictOptions) -> int:
    """Print the classes of every image; 1 if files were skipped, else 0."""
    if options.threads:
        torch.set_num_threads(options.threads)
    skipped: list[str] = []
    rows = predict(options, skipped)
    if options.format == "json":
        print(json.dumps(list(rows), indent=1, ensure_ascii=False))
    elif options.format == "csv":
        out = csv.writer(sys.stdout)
        out.writerow(("image", "rank", "class", "probability"))
        for row in rows:
            for rank, (name, share) in enumerate(row["classes"], 1):
                out.writerow((row["image"], rank, name, f"{share:.6f}"))
    else:
        for row in rows:
            shown = ", ".join(f"{name} {share:.1%}" for name, share in row["classes"])
            print(f"{row['image']}: {shown}", flush=True)
    for problem in skipped:
        print(f"skipped: {problem}", file=sys.stderr)
    return int(bool(skipped))


def predict(options: PredictOptions, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """Yield ``{"image": path, "classes": [(name, probability), ...]}`` for every image in turn.

    Args:
        skipped: what is wrong with images that were left out is put here.

    Raises:
        ValueError: the folder is no run, an image is missing or no image.
    """
    require_extra("timm", "vision", "manyheads predict")
    from timm.data import create_transform

    folder = Path(options.run)
    described = read_description(folder)
    names, channels = described["class_names"], described["in_channels"]
    paths = _paths(options.images)
    model = load_model(folder).eval()
    make = create_transform(
        (channels, described["image_size"], described["image_size"]), interpolation="bicubic",
        mean=tuple(described["mean"]), std=tuple(described["std"]), crop_pct=described["crop"],
        is_training=False,
    )  # fmt: skip
    count = min(options.top_k, len(names))
    for start in range(0, len(paths), options.batch_size):
        good, tensors = [], []
        for path in paths[start : start + options.batch_size]:
            try:
                tensors.append(make(open_image(path, channels)))
                good.append(path)
            except ValueError as error:
                if options.bad == "raise":
                    raise ValueError(f"{error}: leave it out, or pass --bad skip") from None
                skipped.append(str(error))
        if not good:
            continue
        with torch.no_grad():
            shares, classes = model(torch.stack(tensors)).softmax(-1).topk(count)
        for path, share, best in zip(good, shares.tolist(), classes.tolist(), strict=True):
            yield {
                "image": str(path),
                "classes": [(names[c], s) for c, s in zip(best, share, strict=True)],
            }


def _paths(given: tuple[str, ...]) -> list[Path]:
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f"{name!r} holds no images ({', '.join(SUFFIXES)})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"{name!r} does not exist: give image files or folders of them")
    return found
