"""Names of EfficientFormer's weights in the authors' files and in timm's, and tables that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from manyheads.attention.grid.distance import distance_index, resize_distances
from manyheads.layers.conv_norm import conv_norm_keys
from manyheads.layers.keymap import Entry, KeyMap, constant, rename
from manyheads.models.vision.efficientformer.config import EfficientFormerConfig

__all__ = ["DENSE_SIDE", "attention_keys", "block_keys", "fitted", "official_map", "timm_map"]

DENSE_SIDE = 16


def official_map(c: EfficientFormerConfig) -> KeyMap:
    """Names of snap-research/EfficientFormer: stages and convolutions count in one list."""
    entries = conv_norm_keys("stem.0", "patch_embed.0", "patch_embed.1")
    entries += conv_norm_keys("stem.2", "patch_embed.3", "patch_embed.4")
    for i, depth in enumerate(c.depths):
        if i:
            name = f"network.{2 * i - 1}"
            entries += conv_norm_keys(f"stages.{i}.downsample", f"{name}.proj", f"{name}.norm")
        for j in range(depth):
            official = f"network.{2 * i}.{_place(c, i, j)}."
            entries += _block(c, i, j, official, "layer_scale_{}")
        if c.stage_norms:
            entries += _both(f"norms.{i}", f"norm{2 * i}")
    return KeyMap(*entries, *_both("norm", "norm"), *_both("head", "head"),
                  *_both("head_dist", "dist_head"))  # fmt: skip


def timm_map(c: EfficientFormerConfig) -> KeyMap:
    """timm's names."""
    entries = conv_norm_keys("stem.0", "stem.conv1", "stem.norm1")
    entries += conv_norm_keys("stem.2", "stem.conv2", "stem.norm2")
    for i, depth in enumerate(c.depths):
        if i:
            name = f"stages.{i}.downsample"
            entries += conv_norm_keys(name, f"{name}.conv", f"{name}.norm")
        for j in range(depth):
            official = f"stages.{i}.blocks.{_place(c, i, j)}."
            entries += _block(c, i, j, official, "ls{}.gamma")
    heads = [e for name in ("norm", "head", "head_dist") for e in _both(name, name)]
    return KeyMap(*entries, *heads)


def fitted(weights: Mapping[str, Tensor], c: EfficientFormerConfig) -> dict[str, Tensor]:
    """Return a checkpoint with its bias tables resized to those that the model has.

    A model for dense prediction takes a classifier's checkpoint too: its table for 16 x 16 places
    is the trained one resized, the norms of its stages start anew, the classifiers are left out.
    """
    found = dict(weights)
    dense_file = "norm0.weight" in found
    for name, table in weights.items():
        if not name.endswith("token_mixer.attention_biases"):
            continue
        side = math.isqrt(table.shape[-1])
        if c.stage_norms and not dense_file and side * side == table.shape[-1]:
            dense = resize_distances(table, (side, side), (DENSE_SIDE, DENSE_SIDE))
            found[f"{name}_seg"] = dense
        if table.shape[-1] != c.grid[0] * c.grid[1] and side * side == table.shape[-1]:
            found[name] = resize_distances(table, (side, side), c.grid)
    if c.stage_norms and not dense_file:
        for name in weights:
            if name.split(".")[0] in ("norm", "head", "dist_head"):
                del found[name]
        for i, dim in enumerate(c.embed_dims):
            found[f"norm{2 * i}.weight"] = torch.ones(dim)
            found[f"norm{2 * i}.bias"] = torch.zeros(dim)
    return found


def _place(c: EfficientFormerConfig, stage: int, block: int) -> int:
    """Where a block stands in the authors' list, in which the step to tokens has a place too."""
    return block + c.is_token_block(stage, block)


def _both(ours: str, official: str) -> list[Entry]:
    return [rename(f"{ours}.{part}", f"{official}.{part}") for part in ("weight", "bias")]


def _block(
    c: EfficientFormerConfig, stage: int, block: int, official: str, scale: str
) -> list[Entry]:
    ours = f"stages.{stage}.blocks.{block}."
    return block_keys(ours, official, scale=scale, tokens=c.is_token_block(stage, block),
                      grid=c.grid, dense=c.stage_norms)  # fmt: skip


def block_keys(
    ours: str,
    official: str,
    *,
    tokens: bool,
    grid: tuple[int, int] = (7, 7),
    dense: bool = False,
    scale: str = "layer_scale_{}",
) -> list[Entry]:
    """Names of one block's weights, on maps or on tokens."""
    entries = [rename(f"{ours}layer_scale_{i}", official + scale.format(i)) for i in (1, 2)]
    if not tokens:
        for i in (1, 2):
            name = f"mlp.fc{i}"
            entries += conv_norm_keys(ours + name, official + name, f"{official}mlp.norm{i}")
        return entries
    for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
        entries += _both(ours + name, official + name)
    mixer = "token_mixer."
    return entries + attention_keys(ours + mixer, official + mixer, grid=grid, dense=dense)


def attention_keys(
    ours: str, official: str, *, grid: tuple[int, int] = (7, 7), dense: bool = False
) -> list[Entry]:
    """Names of the attention's weights; the authors' files hold the pairs' distances as well."""
    entries = _both(ours + "qkv", official + "qkv") + _both(ours + "proj", official + "proj")
    entries.append(rename(ours + "biases", official + "attention_biases"))
    index = f"{official}attention_bias_idxs"
    entries.append(constant(index, distance_index(*grid), optional=True))
    if dense:
        entries.append(rename(ours + "dense_biases", official + "attention_biases_seg"))
        square = distance_index(DENSE_SIDE, DENSE_SIDE)
        entries.append(constant(f"{index}_seg", square, optional=True))
    return entries
