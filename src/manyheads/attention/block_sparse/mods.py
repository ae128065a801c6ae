"""Masks as functions of positions, and how they combine.

A mask_mod takes integer tensors (sample, head, query position, key position) that broadcast
against each other, and returns whether the query may attend to the key.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = [
    "MaskMod",
    "ScoreMod",
    "and_masks",
    "causal_mask",
    "document_mask",
    "or_masks",
    "prefix_lm_mask",
    "sliding_window_mask",
]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def causal_mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """Let queries attend to keys up to their own position: a mask_mod.

    Example:
        >>> print(create_block_mask(causal_mask, None, None, 256, 256))
        ▒···
        █▒··
        ██▒·
        ███▒
    """
    return q_idx >= kv_idx


def sliding_window_mask(before: int, after: int = 0) -> MaskMod:
    """Return a mask_mod of the keys from ``before`` tokens before the query to ``after`` behind it.

    Raises:
        ValueError: a negative number of tokens.

    Example:
        >>> print(create_block_mask(sliding_window_mask(64), None, None, 256, 256))
        ▒···
        ▒▒··
        ·▒▒·
        ··▒▒
    """
    for name, count in (("before", before), ("after", after)):
        if count < 0:
            raise ValueError(f"{name} {count} must not be negative: a window holds its query")

    def window(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx - kv_idx
        return (distance <= before) & (distance >= -after)

    return window


def prefix_lm_mask(prefix: int | Tensor) -> MaskMod:
    """Return a mask_mod that is causal, but for a prefix that everything attends to.

    Args:
        prefix: its length in tokens, one number or (B) of them.

    Example:
        >>> print(create_block_mask(prefix_lm_mask(128), None, None, 256, 256))
        ██··
        ██··
        ██▒·
        ███▒
    """

    def prefix_lm(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        length = prefix[b] if isinstance(prefix, Tensor) else prefix
        return (kv_idx < length) | (q_idx >= kv_idx)

    return prefix_lm


def document_mask(documents: Tensor) -> MaskMod:
    """Return a mask_mod for packed documents: a query attends to the keys of its own.

    Args:
        documents: (N) or (B, N) integers, the document of each token.

    Raises:
        ValueError: other axes.

    Example:
        >>> documents = torch.tensor([0] * 64 + [1] * 128 + [2] * 64)
        >>> print(create_block_mask(document_mask(documents), None, None, 256, 256))
        █···
        ·██·
        ·██·
        ···█
    """
    if documents.ndim not in (1, 2):
        raise ValueError(
            f"documents has {documents.ndim} axes, expected (length) or (batch, length)"
        )

    def same_document(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if documents.ndim == 1:
            return documents[q_idx] == documents[kv_idx]
        return documents[b, q_idx] == documents[b, kv_idx]

    return same_document


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """Return a mask_mod that lets pass what all of ``mask_mods`` let pass; all, if there are none.

    Example:
        >>> local = and_masks(causal_mask, sliding_window_mask(128))
    """

    def every(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = torch.ones((), dtype=torch.bool, device=q_idx.device)
        for mod in mask_mods:
            found = found & mod(b, h, q_idx, kv_idx)
        return found

    return every


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """Return a mask_mod that lets pass what one of ``mask_mods`` lets pass; nothing, if none is.

    Example:
        >>> sinks = or_masks(sliding_window_mask(128), lambda b, h, q, kv: kv < 4)
    """

    def either(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = torch.zeros((), dtype=torch.bool, device=q_idx.device)
        for mod in mask_mods:
            found = found | mod(b, h, q_idx, kv_idx)
        return found

    return either
