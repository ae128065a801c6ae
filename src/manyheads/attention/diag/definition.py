"""Block-local attention by its definition. B batch, H heads, N length, D head dim, C block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.errors import unknown_name
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import positions

__all__ = ["KINDS", "Kind", "check_kind", "diag_reference", "diag_weights"]

Kind = Literal["softmax", "relu"]
KINDS = ("softmax", "relu")


def check_kind(kind: str, block_size: int) -> None:
    """Raise ValueError for an unknown kind or a block without a place."""
    if kind not in KINDS:
        raise unknown_name("kind of block attention", kind, KINDS)
    if block_size < 1:
        raise ValueError(f"block_size {block_size} must be at least 1")


def diag_weights(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    block_size: int = 64,
    kind: Kind = "softmax",
    scale: float | None = None,
    mask: Tensor | None = None,
    pad_keys: bool = False,
    mask_after_softmax: bool = False,
) -> Tensor:
    """Return the attention matrix (B, H, N, N), zero outside the blocks: for looking only.

    Arguments as :func:`manyheads.attention.diag`. Rows and columns of padded tokens are zero.
    """
    check_kind(kind, block_size)
    batch, heads, length, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    real = query.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    place = positions(real, length, device=query.device)  # (B, N), among real tokens
    block = place // block_size
    within = (block[:, :, None] == block[:, None]) & real[:, None] & real[:, :, None]
    seen = within.tril() if is_causal else within
    seen, within = seen[:, None], within[:, None]
    scores = query @ repeat_kv(key, heads).mT * scale
    if kind == "relu":
        return scores.relu().masked_fill(~seen, 0)
    allowed = within if mask_after_softmax else seen
    scores = scores.masked_fill(~(allowed | ~allowed.any(-1, keepdim=True)), -torch.inf)
    if pad_keys and (mask_after_softmax or not is_causal):
        # Zero keys that fill the last block up: one more column with the score of all of them.
        filled = real.sum(1, keepdim=True).clamp_max(length) - block * block_size
        missing = (block_size - filled).clamp_min(0).to(scores.dtype)
        extra = missing.log()[:, None, :, None].expand(-1, heads, -1, -1)
        weights = torch.cat((scores, extra), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.masked_fill(~seen, 0)


def diag_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    block_size: int = 64,
    kind: Kind = "softmax",
    scale: float | None = None,
    mask: Tensor | None = None,
    pad_keys: bool = False,
    mask_after_softmax: bool = False,
) -> Tensor:
    """Block-local attention through the N x N matrix: the oracle of the tests."""
    check_qkv(query, key, value, same_length=True)
    weights = diag_weights(
        query,
        key,
        is_causal=is_causal,
        block_size=block_size,
        kind=kind,
        scale=scale,
        mask=mask,
        pad_keys=pad_keys,
        mask_after_softmax=mask_after_softmax,
    )
    return weights @ repeat_kv(value, query.shape[1])
