"""Padding and packing: two ways to hold sequences of different lengths in one tensor.

B batch, N padded length, T packed length, S sequences.

``mask`` (B, N) is True at real tokens, which may be padded on either side or both.
``cu_seqlens`` (S + 1) cuts a packed row (1, T, ...) into S sequences: 0 = c_0 <= ... <= c_S = T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "Compaction",
    "check_cu_seqlens",
    "check_mask",
    "compact",
    "map_lengths",
    "map_packed",
    "positions",
    "sequence_ids",
]


def check_mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Return the mask as bool after checking that it is (batch, length), or None.

    Raises:
        ValueError: another shape or a floating-point mask; the axis and the fix are named.
    """
    if mask is None:
        return None
    if mask.is_floating_point():
        raise ValueError(
            f"mask has dtype {mask.dtype}: give bool, True = a real token (additive masks are for "
            "attn_mask-like biases)"
        )
    if mask.shape != (batch, length):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected (batch, length) = ({batch}, {length})"
        )
    return mask.bool()


def check_cu_seqlens(cu_seqlens: Tensor, batch: int, total: int) -> list[int]:
    """Return the borders as a list after checking them.

    Raises:
        ValueError: batch is not 1, borders do not rise from 0 to ``total``.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens needs a packed batch of 1, got batch {batch}")
    borders = [int(b) for b in cu_seqlens.tolist()]
    rising = all(a <= b for a, b in pairwise(borders))
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != total or not rising:
        raise ValueError(
            f"cu_seqlens {borders} must rise from 0 to the packed length {total}, "
            "with one entry more than there are sequences"
        )
    return borders


def positions(mask: Tensor | None, length: int, *, device: torch.device) -> Tensor:
    """Return positions among real tokens, (N,) without a mask or (B, N) with one.

    Left padding does not shift the first real token away from 0; padded tokens get a position
    that is never used.
    """
    if mask is None:
        return torch.arange(length, device=device)
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return, for each of the ``total`` packed tokens, the number of its sequence: (T,)."""
    return torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(total, device=cu_seqlens.device), right=True
    )


class Compaction:
    """Moves the real tokens of each row to its front, in order, and back again.

    Used where the place inside a row matters (blocks, convolutions): with it, padding on either
    side changes nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self.index = torch.argsort(~mask, dim=1, stable=True)  # (B, N)
        self.inverse = torch.argsort(self.index, dim=1)
        lengths = mask.sum(1, keepdim=True)
        self.front = torch.arange(mask.shape[1], device=mask.device) < lengths  # (B, N)

    def gather(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Bring ``x``, whose axis ``dim`` is the length, to the compact order."""
        return _take(x, self.index, dim)

    def scatter(self, x: Tensor, *, dim: int = 1) -> Tensor:
        """Undo :meth:`gather`."""
        return _take(x, self.inverse, dim)


def _take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    wide = (*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index.view(shape).expand(wide))


def compact(mask: Tensor) -> Compaction:
    """Return the :class:`Compaction` of a (B, N) mask."""
    return Compaction(mask)


def map_lengths(
    fn: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    mask: Tensor,
    *,
    dim: int = 2,
) -> Tensor:
    """Call ``fn`` on the real tokens alone, on rows of one length at a time.

    For what depends on the length itself, as a circular convolution does, so that no mask can
    make up for padding. One call for each different length.

    Args:
        fn: called with tensors (B', ..., n, ...) without padding; returns one such tensor.
        tensors: (B, ..., N, ...) tensors whose axis ``dim`` has length N, or None.
        mask: (B, N), True = a real token.
        dim: the length axis of ``tensors`` and of the output.

    Returns:
        (B, ..., N, ...), zeros at padded tokens.
    """
    moved, lengths = compact(mask), mask.sum(1).tolist()
    compacted = [None if t is None else moved.gather(t, dim=dim) for t in tensors]
    order: list[int] = []
    parts: list[Tensor] = []
    for n in sorted(set(lengths), reverse=True):
        # A batch without any real token still has to know the shape of what ``fn`` returns.
        if n == 0 and parts:
            parts.append(parts[0].new_zeros(lengths.count(0), *parts[0].shape[1:]))
        else:
            rows = torch.tensor([i for i, m in enumerate(lengths) if m == n], device=mask.device)
            part = fn(
                *(
                    None if t is None else t.index_select(0, rows).narrow(dim, 0, max(n, 1))
                    for t in compacted
                )
            )
            part = part if n else torch.zeros_like(part)
            missing = list(part.shape)
            missing[dim] = mask.shape[1] - part.shape[dim]
            parts.append(torch.cat((part, part.new_zeros(missing)), dim))
        order += [i for i, m in enumerate(lengths) if m == n]
    back = torch.tensor(order, device=mask.device).argsort()
    return moved.scatter(torch.cat(parts).index_select(0, back), dim=dim)


def map_packed(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    *,
    dim: int = 2,
    per_sequence: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """Call ``fn`` on packed sequences as padded batches, and pack what it returns.

    Sequences are put into buckets by length (each at most twice the shortest of its bucket), so
    at most half of a batch is padding however uneven the lengths are.

    Args:
        fn: called as ``fn(*tensors, *per_sequence, mask)`` with (S', ..., N', ...) tensors and a
            mask (S', N'); returns the output, or the output and per-sequence results.
        tensors: packed (1, ..., T, ...) tensors whose axis ``dim`` has length T, or None.
        cu_seqlens: borders (S + 1).
        dim: the length axis of ``tensors`` and of the output.
        per_sequence: tensors with S as first axis (initial states), or None.

    Returns:
        The packed output (1, ..., T, ...), then the per-sequence results (S, ...).
    """
    first = next(t for t in tensors if t is not None)
    borders = check_cu_seqlens(cu_seqlens, first.shape[0], first.shape[dim])
    lengths = [b - a for a, b in pairwise(borders)]
    order = sorted(range(len(lengths)), key=lambda s: lengths[s])
    buckets: list[list[int]] = []
    for s in order:
        if buckets and lengths[s] <= 2 * lengths[buckets[-1][0]]:
            buckets[-1].append(s)
        else:
            buckets.append([s])

    pieces: list[Tensor | None] = [None] * len(lengths)
    extras: list[list[Tensor | None]] = []
    for bucket in buckets:
        longest = max(lengths[bucket[-1]], 1)
        rows = torch.tensor(bucket, device=first.device)
        starts = torch.tensor([borders[s] for s in bucket], device=first.device)
        sizes = torch.tensor([lengths[s] for s in bucket], device=first.device)
        offsets = torch.arange(longest, device=first.device)
        mask = offsets < sizes[:, None]  # (S', N')
        index = (starts[:, None] + offsets).clamp_max(first.shape[dim] - 1)
        padded = [
            None
            if t is None
            else t.squeeze(0)
            .index_select(dim - 1, index.flatten())
            .unflatten(dim - 1, index.shape)
            .movedim(dim - 1, 0)
            for t in tensors
        ]
        states = [None if t is None else t.index_select(0, rows) for t in per_sequence]
        result = fn(*padded, *states, mask)
        out, *rest = result if isinstance(result, tuple) else (result,)
        for i, s in enumerate(bucket):
            pieces[s] = out[i].narrow(dim - 1, 0, lengths[s])
            if not extras:
                extras = [[None] * len(lengths) for _ in rest]
            for j, extra in enumerate(rest):
                extras[j][s] = extra[i]
    packed = torch.cat([p for p in pieces if p is not None], dim=dim - 1).unsqueeze(0)
    return (packed, *(torch.stack([e for e in extra if e is not None]) for extra in extras))
