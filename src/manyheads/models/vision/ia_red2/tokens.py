"""Tokens that are really gone: gathering, and blocks over images that kept unequal numbers.

B batch, N tokens before any was dropped, M tokens that the fullest image still has, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Tokens", "apply_blocks", "gather_kept", "scatter"]

# Images are computed together as long as the shortest fills this share of the longest.
_FILLED = 0.9


class Tokens(NamedTuple):
    """What is left of a batch.

    Attributes:
        x: (B, M, C); what stands where no token is left is anything.
        places: (B, M), where each token stood among all N; None: nothing was gathered.
        real: (B, M), True at tokens that are still there; None: all are. Where tokens were
            gathered these come first.
        length: N.
    """

    x: Tensor
    places: Tensor | None
    real: Tensor | None
    length: int

    @property
    def alive(self) -> Tensor:
        """Which of all N tokens are still there, bool (B, N)."""
        batch, count = self.x.shape[:2]
        if self.real is None:
            real = torch.ones(batch, count, dtype=torch.bool, device=self.x.device)
        else:
            real = self.real
        return real if self.places is None else _put_back(real, self)

    def here(self, full: Tensor) -> Tensor:
        """Return the entries of (B, N, ...) that belong to the tokens in ``x``."""
        return full if self.places is None else full.gather(1, self.places)


def scatter(values: Tensor, tokens: Tokens) -> Tensor:
    """Put (B, M) or (B, M, C) back where the tokens stood: (B, N, ...), 0 where they are gone."""
    if tokens.real is not None:
        real = tokens.real.view(*tokens.real.shape, *(1 for _ in values.shape[2:]))
        values = values.masked_fill(~real, 0)
    return values if tokens.places is None else _put_back(values, tokens)


def _put_back(values: Tensor, tokens: Tokens) -> Tensor:
    assert tokens.places is not None
    places = tokens.places.view(*tokens.places.shape, *(1 for _ in values.shape[2:]))
    out = values.new_zeros(values.shape[0], tokens.length, *values.shape[2:])
    return out.scatter(1, places.expand_as(values), values)


def gather_kept(tokens: Tokens, policy: Tensor) -> Tokens:
    """Keep the tokens that a policy, bool (B, N), names; order stays, batches are padded."""
    kept = tokens.here(policy)
    if tokens.real is not None:
        kept = kept & tokens.real
    counts = kept.sum(1)
    most, least = int(counts.max()), int(counts.min())
    if least == tokens.x.shape[1]:
        return tokens
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    x = tokens.x.gather(1, order[..., None].expand(-1, -1, tokens.x.shape[2]))
    places = order if tokens.places is None else tokens.places.gather(1, order)
    real = None
    if most != least:
        real = torch.arange(most, device=x.device) < counts[:, None]
    return Tokens(x, places, real, tokens.length)


def apply_blocks(
    blocks: Sequence[nn.Module], tokens: Tokens, *, checkpointing: bool = False
) -> Tokens:
    """Apply transformer blocks to the tokens that are there, to nothing else.

    Images of nearly equal length are computed together, with a mask on the keys that only fill
    up; images of very unequal length apart, so that short ones are not paid as long ones. Blocks
    that take no mask (neither ``keep`` nor ``attn_mask``) see images of equal length together.
    """
    if tokens.real is None:
        x = _run(blocks, tokens.x, None, checkpointing)
        return tokens._replace(x=x)
    if tokens.places is None:  # masked where they stand, in any order
        return tokens._replace(x=_run(blocks, tokens.x, tokens.real, checkpointing))
    masks = all(_mask_name(b) for b in blocks)
    counts = tokens.real.sum(1)
    order = counts.argsort(descending=True, stable=True)
    lengths = counts[order].tolist()
    parts, rows = [], []
    for start, stop in _chunks(lengths, _FILLED if masks else 1.0):
        row, most = order[start:stop], lengths[start]
        real = tokens.real[row, :most] if lengths[stop - 1] < most else None
        x = _run(blocks, tokens.x[row, :most], real, checkpointing)
        parts.append(nn.functional.pad(x, (0, 0, 0, tokens.x.shape[1] - most)))
        rows.append(row)
    back = torch.cat(rows).argsort()
    return tokens._replace(x=torch.cat(parts)[back])


def _chunks(lengths: Sequence[int], filled: float) -> Iterator[tuple[int, int]]:
    """Cut descending lengths where one falls below that share of the first of its chunk."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] < filled * lengths[start]:
            yield start, stop
            start = stop


def _run(
    blocks: Sequence[nn.Module], x: Tensor, keep: Tensor | None, checkpointing: bool
) -> Tensor:
    for block in blocks:
        call = _call(block, x, keep)
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(call, x, use_reentrant=False)
        else:
            x = call(x)
    return x


def _call(block: nn.Module, x: Tensor, keep: Tensor | None) -> Callable[[Tensor], Any]:
    if keep is None:
        return block
    name = _mask_name(block)
    if name == "keep":
        return partial(block, keep=keep)
    if name is None:
        raise ValueError(f"{type(block).__name__} takes no mask, so it cannot be traced here")
    # Added to the logits: not every implementation reads a bool mask in the same sense.
    bias = x.new_zeros(keep.shape).masked_fill(~keep, torch.finfo(x.dtype).min / 2)
    return partial(block, attn_mask=bias[:, None, None, :])


def _mask_name(block: nn.Module) -> str | None:
    """Return how the forward of a block calls a mask: keep (ours), attn_mask (timm's), or None."""
    # Ours say so themselves: signatures cannot be read while a graph is traced.
    if getattr(block, "takes_keep", False):
        return "keep"
    return "attn_mask" if "attn_mask" in inspect.signature(block.forward).parameters else None
