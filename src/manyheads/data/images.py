"""Labelled images: folders by class, the digits of scikit-learn, and the colour emoji of Noto.

Images stay as they are stored; they are opened one by one, as PIL images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from manyheads.data.seeding import hold_out_indices
from manyheads.errors import nearest, require_extra

__all__ = ["BUILTIN_IMAGES", "SUFFIXES", "ImageData", "ImageSplit", "load_images", "open_image"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
_EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_LEAST_EMOJI = 40  # images of a class

Bad = Literal["raise", "skip"]


@dataclass(frozen=True, slots=True)
class ImageSplit:
    """Images of one split: paths, or arrays (H, W) or (H, W, C) of uint8, and class numbers."""

    images: Sequence[Any]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Sequence[int]) -> ImageSplit:
        """Return some of the images."""
        return ImageSplit([self.images[i] for i in index], self.labels[list(index)])


@dataclass(frozen=True, slots=True)
class ImageData:
    """A classification problem.

    Attributes:
        name: what it is.
        train, test: the splits; nothing is left out but what ``skipped`` names.
        class_names: by number.
        in_channels: 1 where all images are grey, else 3.
        sha256: of all images and labels.
        skipped: files that are no images.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    in_channels: int
    sha256: str
    skipped: tuple[str, ...] = ()


def open_image(source: Any, in_channels: int) -> Any:
    """Return a PIL image, grey for 1 channel and RGB for 3; transparency stands on white.

    Raises:
        ValueError: a file that is no image; it is named.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
    else:
        try:
            with Image.open(source) as opened:
                opened.load()
                image = opened.copy()
        except (
            UnidentifiedImageError,
            OSError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            raise ValueError(f"{os.fspath(source)!r} is no readable image: {error}") from None
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, rgba)
    return image.convert("L" if in_channels == 1 else "RGB")


def load_images(
    name: str, *, test_fraction: float = 0.2, seed: int = 0, bad: Bad = "raise"
) -> ImageData:
    """Read a data set.

    Args:
        name: "builtin:digits", "builtin:emoji", or a folder: ``train`` and ``val`` or ``test``
            folders of class folders, class folders alone (a share of each class is held out), or
            ``0.json`` to ``9.json`` of flattened 28 x 28 digits.
        test_fraction: share of each class that is held out where the data come without a split.
        seed: of that choice.
        bad: "raise" for a file that is no image, or "skip" it.

    Raises:
        ValueError: no such data, a class with too few images, a file that is no image.
        MissingExtraError: the package of a builtin set, or pillow, is not installed.
    """
    require_extra("PIL", "vision", "reading images")
    if name.startswith("builtin:"):
        key = name.removeprefix("builtin:")
        if key not in BUILTIN_IMAGES:
            raise ValueError(
                f"no images {name!r}{nearest(key, BUILTIN_IMAGES)}: there are "
                + ", ".join(f"builtin:{k}" for k in BUILTIN_IMAGES)
            )
        return BUILTIN_IMAGES[key](test_fraction, seed)
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"data {name!r} is no folder: give one with a folder of images for each class, or "
            + ", ".join(f"builtin:{k}" for k in BUILTIN_IMAGES)
        )
    if (folder / "0.json").is_file():
        return _json_digits(folder, test_fraction, seed)
    return _folder(folder, test_fraction, seed, bad)


def _digits(test_fraction: float, seed: int) -> ImageData:
    """1,797 digits of 8 x 8 by 43 writers; the last fifth is held out: other writers, mostly."""
    require_extra("sklearn", "data", "builtin:digits")
    from sklearn.datasets import load_digits

    read = load_digits()
    images = np.round(read.images * (255 / 16)).astype(np.uint8)
    cut = len(images) - round(len(images) * test_fraction)
    whole = ImageSplit(list(images), read.target.astype(np.int64))
    return _assembled(
        "digits of scikit-learn",
        whole.take(range(cut)),
        whole.take(range(cut, len(images))),
        tuple(str(i) for i in range(10)),
    )


def _json_digits(folder: Path, test_fraction: float, seed: int) -> ImageData:
    """Files 0.json to 9.json, each {"data": [784 floats in 0..1 an image, ...]}."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for digit in range(10):
        path = folder / f"{digit}.json"
        try:
            flat = np.asarray(json.loads(path.read_text())["data"], dtype=np.float64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no digits: {error}") from None
        if flat.size % 784:
            raise ValueError(f"{path} holds {flat.size} numbers, not a multiple of 28 x 28 = 784")
        rows = np.round(flat.reshape(-1, 28, 28) * 255).astype(np.uint8)
        images += list(rows)
        labels += [digit] * len(rows)
    whole = ImageSplit(images, np.asarray(labels))
    names = tuple(str(i) for i in range(10))
    return _assembled("digits", *_split(whole, test_fraction, seed), names)


def _emoji(test_fraction: float, seed: int) -> ImageData:
    """Colour emoji of Noto by Unicode block, as RGBA on white."""
    require_extra("fontTools", "data", "builtin:emoji")
    if not _EMOJI_FONT.is_file():
        raise ValueError(
            f"builtin:emoji needs {_EMOJI_FONT}: apt-get install fonts-noto-color-emoji"
        )
    import io

    from fontTools.ttLib import TTFont
    from fontTools.unicodedata import block
    from PIL import Image

    font = TTFont(_EMOJI_FONT)
    bitmaps = font["CBDT"].strikeData[0]
    found: dict[str, list[np.ndarray]] = {}
    for code, glyph in sorted(font.getBestCmap().items()):
        if glyph in bitmaps and code > 0xFF:
            with Image.open(io.BytesIO(bitmaps[glyph].imageData)) as png:
                found.setdefault(block(chr(code)), []).append(np.asarray(png.convert("RGBA")))
    kept = {name: images for name, images in sorted(found.items()) if len(images) >= _LEAST_EMOJI}
    names = tuple(kept)
    images = [image for rows in kept.values() for image in rows]
    labels = np.asarray([i for i, rows in enumerate(kept.values()) for _ in rows])
    split = _split(ImageSplit(images, labels), test_fraction, seed)
    return _assembled("emoji by Unicode block", *split, names)


BUILTIN_IMAGES: dict[str, Callable[[float, int], ImageData]] = {"digits": _digits, "emoji": _emoji}


def _folder(folder: Path, test_fraction: float, seed: int, bad: Bad) -> ImageData:
    parts = [folder / p for p in ("train", "training")]
    held = [folder / p for p in ("val", "valid", "validation", "test")]
    train = next((p for p in parts if p.is_dir()), None)
    test = next((p for p in held if p.is_dir()), None)
    if train is not None and test is None:
        raise ValueError(f"{str(folder)!r} has a folder {train.name!r} but none of val, test")
    root = folder if train is None else train
    names = tuple(sorted(p.name for p in root.iterdir() if p.is_dir()))
    if len(names) < 2:
        raise ValueError(
            f"{str(root)!r} holds {len(names)} folders: put the images of each class into a folder "
            "that has the class's name"
        )
    skipped: list[str] = []
    if train is None or test is None:
        whole = _read(root, names, bad, skipped)
        split = _split(whole, test_fraction, seed)
    else:
        extra = {p.name for p in test.iterdir() if p.is_dir()} - set(names)
        if extra:
            raise ValueError(
                f"{str(test)!r} has classes that {train.name!r} lacks: {sorted(extra)}"
            )
        split = _read(train, names, bad, skipped), _read(test, names, bad, skipped)
    return _assembled(folder.resolve().name, *split, names, tuple(skipped))


def _read(root: Path, names: Sequence[str], bad: Bad, skipped: list[str]) -> ImageSplit:
    paths: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(names):
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                continue
            if problem := _problem(path):
                if bad == "raise":
                    raise ValueError(f"{problem}: delete it, or pass bad='skip'")
                skipped.append(str(path))
                continue
            paths.append(path)
            labels.append(number)
    if not paths:
        raise ValueError(f"{str(root)!r} holds no images ({', '.join(SUFFIXES)})")
    return ImageSplit(paths, np.asarray(labels))


def _problem(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:
        return f"{str(path)!r} is no readable image ({error})"
    return None


def _split(whole: ImageSplit, fraction: float, seed: int) -> tuple[ImageSplit, ImageSplit]:
    train, test = hold_out_indices(
        whole.labels, fraction, seed, option="test_fraction", what="images"
    )
    return whole.take(train), whole.take(test)


def _assembled(
    name: str,
    train: ImageSplit,
    test: ImageSplit,
    class_names: tuple[str, ...],
    skipped: tuple[str, ...] = (),
) -> ImageData:
    digest = hashlib.sha256()
    for split in (train, test):
        digest.update(split.labels.astype(np.int64).tobytes())
        for image in split.images:
            digest.update(image.tobytes() if isinstance(image, np.ndarray) else image.read_bytes())
    channels = 1 if all(map(_is_grey, (*train.images, *test.images))) else 3
    return ImageData(name, train, test, class_names, channels, digest.hexdigest(), skipped)


def _is_grey(image: Any) -> bool:
    if isinstance(image, np.ndarray):
        return image.ndim == 2
    from PIL import Image

    with Image.open(image) as opened:
        return opened.mode in ("1", "L", "I", "I;16")
