"""From a LLaMA to one with landmarks: its new token, and the published weight difference."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor

from manyheads.errors import nearest
from manyheads.layers.keymap import read_weights

__all__ = ["add_token", "apply_weight_diff"]

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")

Weights = str | PathLike[str] | Mapping[str, Tensor]


def add_token(weights: Weights, *, count: int = 1) -> dict[str, Tensor]:
    """Return LLaMA weights with new tokens, each the mean of those that are there.

    Args:
        weights: a path or a state dict under the names of transformers' Llama.
        count: tokens to add.

    Raises:
        ValueError: the weights hold no embedding, or count is negative.
    """
    if count < 0:
        raise ValueError(f"count {count} must not be negative: tokens to add")
    grown = read_weights(weights)
    if _VOCABULARY[0] not in grown:
        raise ValueError(f"no {_VOCABULARY[0]!r} in the weights{nearest(_VOCABULARY[0], grown)}")
    for name in _VOCABULARY:
        if name in grown:
            grown[name] = _grow(grown[name], grown[name].shape[0] + count)
    return grown


def apply_weight_diff(base: Weights, diff: Weights) -> dict[str, Tensor]:
    """Return base + diff: how weights are published that may not be given away whole.

    Tokens that the base lacks count as the mean of its tokens, as they were before training.

    Args:
        base: the original weights, a path or a state dict under the names of transformers' Llama.
        diff: the published difference under the same names.

    Raises:
        ValueError: a tensor is on one side only, or shapes differ; all are listed.

    Example:
        >>> base = {"model.norm.weight": torch.ones(2)}
        >>> apply_weight_diff(base, {"model.norm.weight": torch.tensor([0.5, 0.0])})
        {'model.norm.weight': tensor([1.5000, 1.0000])}
    """
    # Rotary frequencies are no weights: their difference says nothing.
    ours, theirs = (
        {k: t for k, t in read_weights(w).items() if not k.endswith("rotary_emb.inv_freq")}
        for w in (base, diff)
    )
    problems = [f"the base has no {k!r}{nearest(k, ours)}" for k in theirs if k not in ours]
    problems += [
        f"the difference has no {k!r}{nearest(k, theirs)}" for k in ours if k not in theirs
    ]
    total: dict[str, Tensor] = {}
    for name, change in theirs.items():
        if name not in ours:
            continue
        tensor = ours[name]
        if name in _VOCABULARY and tensor.shape[0] < change.shape[0]:
            tensor = _grow(tensor, change.shape[0])
        if tensor.shape != change.shape:
            problems.append(
                f"{name!r} has shape {tuple(tensor.shape)} in the base, {tuple(change.shape)} in "
                "the difference"
            )
        else:
            total[name] = tensor + change.to(tensor)
    if problems:
        raise ValueError("base and difference do not fit:\n  " + "\n  ".join(problems[:20]))
    return total


def _grow(matrix: Tensor, rows: int) -> Tensor:
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat((matrix, mean.expand(rows - matrix.shape[0], -1)))
