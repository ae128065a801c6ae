"""Landmark attention over regular blocks by tiles: no N x M matrix, forward or backward.

G batch times heads, N queries (the last N of M keys), D and V head dims, L block with its
landmark, n and m query and key blocks.

With p the softmax inside an earlier block, g the score of its landmark and Z the logarithm of the
sum over the query's competitors (own tokens and earlier landmarks), a block's tokens get
exp(g − Z) p: an online softmax over landmarks whose every term carries a softmax of its own.
Backward, with w = exp(g − Z), δ = dO · O and d̄ the mean of dP under p: dS = w p (dP − d̄) at
ordinary keys and dS = w (d̄ − δ) at the landmark. Only outputs and Z are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.layers.precision import without_autocast

__all__ = ["block_flops", "block_landmark", "block_landmark_total"]

_TILE_NUMBERS = 1 << 18  # scores in one tile: 1 MiB in float32
_ROWS, _KEYS = 256, 512  # about so many queries and keys meet in one tile


def block_landmark(
    query: Tensor, key: Tensor, value: Tensor, *, block_size: int, scale: float
) -> Tensor:
    """Return (B, H, N, V) for (B, H, N, D), (B, H, M, D) and (B, H, M, V) in float32 or float64."""
    first, last = (key.shape[2] - query.shape[2]) // block_size, (key.shape[2] - 1) // block_size
    if first == last and query.shape[2] < key.shape[2]:
        return _within_last(query, key, value, first * block_size, block_size, scale)
    return block_landmark_total(query, key, value, block_size=block_size, scale=scale)[0]


def block_landmark_total(
    query: Tensor, key: Tensor, value: Tensor, *, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, and Z (B, H, N) without gradient, to join it with further keys."""
    return _forward_op(query, key, value, _cap(block_size, key.shape[2]), scale)


def _within_last(
    query: Tensor, key: Tensor, value: Tensor, before: int, size: int, scale: float
) -> Tensor:
    """Attend with queries that all lie in the last block: what is decoded, and nothing padded.

    ``before``: keys of earlier blocks.
    """
    query = query * scale
    queries, keys = query.shape[2], key.shape[2]
    own = query @ key[:, :, before:].mT
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=own.device)
    hidden = hidden.triu(keys - queries + 1)[:, before:]
    if keys - before == size:
        hidden[:, -1] = True
    own = own.masked_fill(hidden, -torch.inf)
    far = (query @ key[:, :, :before].mT).unflatten(-1, (before // size, size))
    top = torch.cat((own, far[..., -1]), -1).softmax(-1)
    own, gate = top.split((own.shape[-1], far.shape[3]), -1)
    inner = far[..., :-1].softmax(-1) * gate[..., None]
    inner = torch.nn.functional.pad(inner, (0, 1)).flatten(3)  # landmarks give nothing
    return own @ value[:, :, before:] + inner @ value[:, :, :before]


def _cap(block_size: int, keys: int) -> int:
    """Return a block that is as good for so few keys, and needs less padding."""
    return min(block_size, keys + 1)


def block_flops(queries: int, keys: int, dim: int, value_dim: int, block_size: int) -> int:
    """Return the forward FLOPs of one head's matrix products."""
    block_size = _cap(block_size, keys)
    first, count = _placement(queries, keys, block_size)
    rows = _rows(block_size)
    tiles, rest = divmod(count, rows)
    # Each tile of query blocks meets all blocks before its last.
    met = rows * (tiles * (first - 1) + rows * tiles * (tiles + 1) // 2)
    met += rest * (first + count - 1)
    pairs = (count + met) * block_size**2
    return 2 * pairs * (dim + value_dim)


@torch.library.custom_op("manyheads::landmark", mutates_args=())
@without_autocast
def _forward_op(
    query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    out, total = _empty_out(query, value)
    blocks = _cut(query * scale, key, value, block_size)
    # A tile's queries are not read again, so that its outputs may take their place.
    same = query.shape[-1] == value.shape[-1]
    shape = (*blocks.query.shape[:3], value.shape[-1])
    padded = blocks.query if same else blocks.query.new_empty(shape)
    totals = padded.new_empty(padded.shape[:3])
    for heads in _head_tiles(blocks):
        q, k, v = (t[heads] for t in blocks[:3])
        own = slice(blocks.first, blocks.first + q.shape[1])
        scores = (q @ k[:, own].mT).masked_fill_(_hidden(block_size, q.device), -torch.inf)
        top = scores.amax(-1, keepdim=True)  # (G, n, L, 1)
        weights = scores.sub_(top).exp_()
        sums = weights.sum(-1, keepdim=True)
        sums_out = weights @ v[:, own]
        for rows, spans in _tiles(blocks.first, q.shape[1], block_size):
            m, z, acc = (t[:, rows].flatten(1, 2) for t in (top, sums, sums_out))
            for span in spans:
                inner, gate = _tile(q, k, blocks.first, rows, span)
                higher = torch.maximum(m, gate.amax(-1, keepdim=True))
                shrink = (m - higher).exp_()
                gate = gate.sub_(higher).exp_()
                z = torch.addcmul(gate.sum(-1, keepdim=True), z, shrink)
                inner.mul_(gate[..., None])
                acc = torch.baddbmm(acc * shrink, inner.flatten(2), v[:, span].flatten(1, 2))
                m = higher
            shape = (-1, rows.stop - rows.start, block_size)
            padded[heads, rows] = (acc / z).view(*shape, acc.shape[-1])
            totals[heads, rows] = (m + z.log()).view(shape)
    take = slice(blocks.skip, blocks.skip + query.shape[2])
    out.copy_(padded.flatten(1, 2)[:, take].view(out.shape))
    total.copy_(totals.flatten(1, 2)[:, take].view(total.shape))
    return out, total


@_forward_op.register_fake
def _(query, key, value, block_size, scale):  # type: ignore[no-untyped-def]
    return _empty_out(query, value)


@torch.library.custom_op("manyheads::landmark_backward", mutates_args=())
@without_autocast
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    total: Tensor,
    grad: Tensor,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _cut(query * scale, key, value, block_size)
    grads, delta, totals = (
        _pad(t, blocks.skip, blocks.query.shape[1], block_size)
        for t in (grad, (grad * out).sum(-1, keepdim=True), total[..., None])
    )
    dq, dk, dv = (torch.zeros_like(t) for t in blocks[:3])
    for heads in _head_tiles(blocks):
        q, k, v = (t[heads] for t in blocks[:3])
        g, d, z = grads[heads], delta[heads], totals[heads]
        own = slice(blocks.first, blocks.first + q.shape[1])
        scores = (q @ k[:, own].mT).masked_fill_(_hidden(block_size, q.device), -torch.inf)
        weights = scores.sub_(z).exp_()
        dv[heads, own] += weights.mT @ g
        weights.mul_((g @ v[:, own].mT).sub_(d))
        dq[heads] += weights @ k[:, own]
        dk[heads, own] += weights.mT @ q
        for rows, spans in _tiles(blocks.first, q.shape[1], block_size):
            gr, dr, zr, qr = (t[:, rows].flatten(1, 2) for t in (g, d, z, q))
            sums = torch.zeros_like(qr)
            for span in spans:
                inner, gate = _tile(q, k, blocks.first, rows, span)
                gate = gate.sub_(zr).exp_()  # (G, T, blocks)
                slope = (gr @ v[:, span].flatten(1, 2).mT).view_as(inner)
                mean = (inner * slope).sum(-1, keepdim=True)
                inner.mul_(gate[..., None])
                dv[heads, span] += (inner.flatten(2).mT @ gr).view_as(v[:, span])
                slope = slope.sub_(mean).mul_(inner)
                slope[..., -1] = mean.squeeze(-1).sub_(dr).mul_(gate)
                sums = torch.baddbmm(sums, slope.flatten(2), k[:, span].flatten(1, 2))
                dk[heads, span] += (slope.flatten(2).mT @ qr).view_as(k[:, span])
            dq[heads, rows] += sums.view_as(q[:, rows])
    dquery = dq.flatten(1, 2)[:, blocks.skip : blocks.skip + query.shape[2]].mul_(scale)
    keys = key.shape[2]
    return (
        dquery.reshape(query.shape),
        dk.flatten(1, 2)[:, :keys].reshape(key.shape),
        dv.flatten(1, 2)[:, :keys].reshape(value.shape),
    )


@_backward_op.register_fake
def _(query, key, value, out, total, grad, block_size, scale):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, ctx.block_size, ctx.scale = inputs
    out, total = output
    ctx.mark_non_differentiable(total)
    ctx.save_for_backward(query, key, value, out, total)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    return *_backward_op(*ctx.saved_tensors, grad, ctx.block_size, ctx.scale), None, None


_forward_op.register_autograd(_backward, setup_context=_context)


class _Blocks(NamedTuple):
    """Whole blocks (G, n or m, L, ...), queries placed in the keys' blocks.

    ``first``: key block of the first query block. ``skip``: padded queries before the first.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    first: int
    skip: int


def _cut(query: Tensor, key: Tensor, value: Tensor, size: int) -> _Blocks:
    first, count = _placement(query.shape[2], key.shape[2], size)
    skip = (key.shape[2] - query.shape[2]) % size
    total = -(-key.shape[2] // size)
    q = _pad(query, skip, count, size)
    return _Blocks(q, _pad(key, 0, total, size), _pad(value, 0, total, size), first, skip)


def _pad(x: Tensor, skip: int, count: int, size: int) -> Tensor:
    """(B, H, N, D) to (G, count, size, D) with ``skip`` rows of zeros before, the rest after."""
    x = x.reshape(-1, *x.shape[2:])
    if skip or x.shape[1] != count * size:
        padded = x.new_zeros(x.shape[0], count * size, x.shape[2])
        padded[:, skip : skip + x.shape[1]] = x
        x = padded
    return x.unflatten(1, (count, size))


def _placement(queries: int, keys: int, size: int) -> tuple[int, int]:
    """Return the key block of the first query, and the number of blocks that hold queries."""
    first = (keys - queries) // size
    return first, -(-keys // size) - first


def _head_tiles(blocks: _Blocks) -> Iterator[slice]:
    rows = max(_ROWS, blocks.query.shape[2])
    size = max(1, _TILE_NUMBERS // (rows * max(_KEYS, blocks.key.shape[2])))
    for start in range(0, blocks.query.shape[0], size):
        yield slice(start, start + size)


def _tiles(first: int, count: int, size: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield spans of query blocks and, for each, the spans of key blocks before its last."""
    rows, keys = _rows(size), max(1, _KEYS // size)
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        last = first + stop - 1
        yield slice(start, stop), [slice(a, min(a + keys, last)) for a in range(0, last, keys)]


def _rows(size: int) -> int:
    """Return the query blocks of one tile."""
    return max(1, _ROWS // size)


def _tile(q: Tensor, k: Tensor, first: int, rows: slice, span: slice) -> tuple[Tensor, Tensor]:
    """Return the softmax inside each block (G, T, blocks, L), and the landmarks' scores.

    Landmarks themselves get 0 inside; those of blocks that are not earlier have the score -inf.
    """
    size = k.shape[2]
    scores = q[:, rows].flatten(1, 2) @ k[:, span].flatten(1, 2).mT
    scores = scores.unflatten(-1, (-1, size))
    gate = scores[..., -1].clone()
    scores[..., -1] = -torch.inf
    if span.stop > first + rows.start:
        queries = torch.arange(first + rows.start, first + rows.stop, device=q.device)
        later = torch.arange(span.start, span.stop, device=q.device) >= queries[:, None]
        gate.masked_fill_(later.repeat_interleave(size, 0), -torch.inf)
    return scores.softmax(-1), gate


def _hidden(size: int, device: torch.device) -> Tensor:
    """Return (L, L), True where a query does not see a key of its own block."""
    hidden = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    hidden[:, -1] = True
    return hidden


def _empty_out(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3])
