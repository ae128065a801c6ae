"""Official checkpoints of VOLO for another image size or another number of classes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from manyheads.layers.grid import resize_map
from manyheads.layers.keymap import read_weights

__all__ = ["fitted", "resize_grid"]


def resize_grid(positions: Tensor, size: tuple[int, int]) -> Tensor:
    """Return learned positions (1, h, w, C) for a grid of ``size`` rows and columns, bicubic."""
    return resize_map(positions.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)


def fitted(source: Any, *, grid: tuple[int, int], heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a checkpoint and fit it to a model's image size and classes.

    Args:
        source: a path or a mapping; a wrapper (``state_dict_ema`` before ``state_dict``) and the
            prefix ``module.`` are taken off.
        grid: rows and columns that the positions are resized to.
        heads: the model's own classifiers by name. They stand in for those of the file if these
            tell another number of classes apart, with a warning.
    """
    weights = read_weights(source)
    for nesting in ("state_dict_ema", "state_dict"):
        if isinstance(weights.get(nesting), Mapping):
            weights = dict(cast(Mapping[str, Tensor], weights[nesting]))
    weights = {k.removeprefix("module."): t for k, t in weights.items()}
    positions = weights.get("pos_embed")
    if positions is not None and positions.ndim == 4:
        weights["pos_embed"] = resize_grid(positions, grid)
    theirs, ours = weights.get("head.weight"), heads.get("head.weight")
    classes = [0 if w is None else w.shape[0] for w in (theirs, ours)]
    if theirs is not None and classes[0] != classes[1]:
        kept = {n: t for n, t in weights.items() if not n.startswith(("head.", "aux_head."))}
        warnings.warn(
            f"the checkpoint tells {classes[0]} classes apart, the model {classes[1]}: its "
            "classifiers are not loaded",
            stacklevel=3,
        )
        return kept | dict(heads)
    return weights
