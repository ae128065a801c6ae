"""Prefix softmax by chunks: matrix products, a closed-form backward, O(N) memory.

B batch, H heads, R = B·H rows, N length, n chunks of C tokens, V value dim.

With the running maximum m_i of the scores, the pair (i, j <= i) inside a chunk weighs
exp(s_j − m_i) <= 1: one triangular C x C matrix a chunk. What a chunk leaves behind, its last
row times its values, is relative to the maximum at its end; these totals are combined by the
same kind of triangular matrix, n x n, in pieces whose temporaries stay in the processor's cache.
m enters as a constant: the output does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from manyheads.attention.aaren import native
from manyheads.attention.aaren.definition import finite
from manyheads.layers.precision import without_autocast
from manyheads.native import library

__all__ = ["flops", "pieces", "prefix_softmax"]

_PIECE_NUMBERS = 1 << 19  # numbers in one (r, n, C, V) temporary: 2 MiB in float32
_PIECE_CHUNKS = 256  # chunks of a row whose totals are combined at once


def prefix_softmax(
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    weighted: Tensor,
    *,
    chunk_size: int,
    kernel: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return all outputs (B, H, N, V), m and u after each token (B, H, N), and the last w.

    Args:
        scores: (B, H, N), -inf for a token that is not there.
        values: (B, H, N, V), finite.
        maximum, normalizer, weighted: the state before the first token.
        chunk_size: C.
        kernel: False keeps to PyTorch where there are kernels.

    All tensors have one dtype, float32 or float64. No gradient flows through either m.
    """
    return _forward_op(scores, values, maximum, normalizer, weighted, chunk_size, kernel)


@torch.library.custom_op("manyheads::prefix_softmax", mutates_args=())
@without_autocast
def _forward_op(
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    normalizer: Tensor,
    weighted: Tensor,
    chunk_size: int,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lib = library("prefix", like=values) if kernel else None
    if lib is not None:
        return native.forward(lib, scores, values, maximum, normalizer, weighted)
    m = torch.maximum(scores.cummax(-1).values, maximum[..., None])
    u = torch.empty_like(m)
    out = values.new_empty(values.shape)
    u_last, w_last = normalizer.clone(), weighted.clone()
    rows = _Rows(scores, m, maximum)
    v_rows, u_rows, out_rows = (t.flatten(0, 1) for t in (values, u, out))
    u_carried, w_carried = u_last.view(-1, 1), w_last.view(-1, 1, values.shape[-1])
    for piece in rows.pieces(values.shape[-1], chunk_size):
        r, part, _ = piece
        p, between, entering = rows.weights(piece)
        v = piece.cut(v_rows)
        target = out_rows[r, part]
        if target.is_contiguous():
            own = piece.cut(out_rows)
            torch.bmm(p.flatten(0, 1), v.flatten(0, 1), out=own.flatten(0, 1))
        else:
            own = p @ v
        totals = p.sum(-1)
        w_in = between @ torch.cat((w_carried[r], own[:, :, -1]), 1)  # (r, n + 1, V)
        u_in = torch.cat((u_carried[r], totals[..., -1]), 1)
        u_in = (between @ u_in[..., None]).squeeze(-1)
        totals.addcmul_(entering, u_in[:, :-1, None])
        own.addcmul_(entering[..., None], w_in[:, :-1, None])
        own.mul_(_inverse(totals)[..., None])
        u_rows[r, part] = totals.flatten(1)
        if not target.is_contiguous():
            target.copy_(own.flatten(1, 2))
        u_carried[r], w_carried[r] = u_in[:, -1:], w_in[:, -1:]
    return out, m, u, w_last


@_forward_op.register_fake
def _(scores, values, maximum, normalizer, weighted, *rest):  # type: ignore[no-untyped-def]
    m = scores.new_empty(scores.shape)
    return values.new_empty(values.shape), m, torch.empty_like(m), torch.empty_like(weighted)


@torch.library.custom_op("manyheads::prefix_softmax_backward", mutates_args=())
@without_autocast
def _backward_op(
    scores: Tensor,
    values: Tensor,
    maximum: Tensor,
    out: Tensor,
    m: Tensor,
    u: Tensor,
    grad_out: Tensor,
    grad_u: Tensor,
    grad_final: Tensor,
    chunk_size: int,
    kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Walk the pieces backwards with the gradients of w and u at the piece's end.

    With dw_i = do_i / u_i and du_i = −(do_i · o_i) / u_i, token j collects both with the weights
    of its own column, and its score's gradient is v_j · dv_j plus what it collected of du.
    """
    lib = library("prefix", like=values) if kernel else None
    if lib is not None:
        return native.backward(
            lib, scores, values, maximum, out, m, u, grad_out, grad_u, grad_final
        )
    grad_scores = scores.new_empty(scores.shape)
    grad_values = values.new_empty(values.shape)
    u_first, w_first = torch.zeros_like(maximum), grad_final.clone()
    rows = _Rows(scores, m, maximum)
    v_rows, o_rows, u_rows, do_rows, du_rows, dv_rows, ds_rows = (
        t.flatten(0, 1) for t in (values, out, u, grad_out, grad_u, grad_values, grad_scores)
    )
    u_carried, w_carried = u_first.view(-1, 1), w_first.view(-1, 1, values.shape[-1])
    for piece in reversed(rows.pieces(values.shape[-1], chunk_size)):
        r, part, _ = piece
        p, between, entering = rows.weights(piece)
        v, o, do = (piece.cut(t) for t in (v_rows, o_rows, do_rows))
        dw = do * _inverse(piece.cut(u_rows))[..., None]
        du = piece.cut(du_rows) - (dw * o).sum(-1)
        w_here = (entering[:, :, None] @ dw).squeeze(-2)
        u_here = (entering * du).sum(-1)
        w_later = between.mT @ torch.cat((w_here, w_carried[r]), 1)
        u_later = torch.cat((u_here, u_carried[r]), 1)
        u_later = (between.mT @ u_later[..., None]).squeeze(-1)
        dw[:, :, -1] += w_later[:, 1:]
        du[:, :, -1] += u_later[:, 1:]
        target = dv_rows[r, part]
        if target.is_contiguous():
            dv = piece.cut(dv_rows)
            torch.bmm(p.flatten(0, 1).mT, dw.flatten(0, 1), out=dv.flatten(0, 1))
        else:
            dv = p.mT @ dw
            target.copy_(dv.flatten(1, 2))
        ds = (p.mT @ du[..., None]).squeeze(-1)
        ds += (v * dv).sum(-1)
        ds_rows[r, part] = ds.flatten(1)
        u_carried[r], w_carried[r] = u_later[:, :1], w_later[:, :1]
    return grad_scores, grad_values, u_first, w_first


@_backward_op.register_fake
def _(scores, values, maximum, out, m, u, do, du, grad_final, *rest):  # type: ignore[no-untyped-def]
    grads = scores.new_empty(scores.shape), values.new_empty(values.shape)
    return *grads, torch.empty_like(maximum), torch.empty_like(grad_final)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    scores, values, maximum, _, _, *ctx.options = inputs
    out, m, u, _ = output
    ctx.mark_non_differentiable(m)
    ctx.save_for_backward(scores, values, maximum, out, m, u)


def _backward(ctx, grad_out, _, grad_u, grad_final):  # type: ignore[no-untyped-def]
    grads = _backward_op(*ctx.saved_tensors, grad_out, grad_u, grad_final, *ctx.options)
    return grads[0], grads[1], None, grads[2], grads[3], None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Piece(NamedTuple):
    """Some rows, some of their tokens, in chunks: what is computed at once."""

    rows: slice
    part: slice
    chunk_size: int

    def cut(self, t: Tensor) -> Tensor:
        """(R, N, ...) to (r, n, C, ...)."""
        return t[self.rows, self.part].unflatten(1, (-1, self.chunk_size))


def pieces(rows: int, length: int, dim: int, chunk_size: int) -> list[_Piece]:
    """Cut all rows into pieces of whole chunks; a last, shorter chunk is a piece of its own."""
    return [
        _Piece(slice(row, min(row + group, rows)), slice(at, min(at + size, last)), chunk)
        for first, last, chunk, group, size in _runs(length, dim, chunk_size)
        for row in range(0, rows, group)
        for at in range(first, last, size)
    ]


def _runs(length: int, dim: int, chunk_size: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield for the whole chunks and for the rest: first, last, chunk, rows and tokens a piece."""
    chunk_size = min(chunk_size, max(length, 1))
    whole = length - length % chunk_size
    for first, last, chunk in ((0, whole, chunk_size), (whole, length, length - whole)):
        if first < last:
            tokens = max(1, _PIECE_NUMBERS // (max(dim, chunk) * chunk)) * chunk
            size = min(tokens, _PIECE_CHUNKS * chunk, last - first)
            yield first, last, chunk, max(1, tokens // (last - first)), size


def _kinds(
    rows: int, length: int, dim: int, chunk_size: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield how many pieces there are of each size, their rows, their tokens and their chunk.

    Their number does not depend on the length: lengths that no memory holds can be asked for.
    """
    for first, last, chunk, group, size in _runs(length, dim, chunk_size):
        for high, many in ((group, rows // group), (rows % group, 1)):
            for wide, more in ((size, (last - first) // size), ((last - first) % size, 1)):
                if high and wide and many and more:
                    yield many * more, high, wide, chunk


def flops(rows: int, length: int, dim: int, chunk_size: int) -> int:
    """Return the FLOPs (2 a multiply-add) of the forward pass's matrix products."""
    total = 0
    for number, count, tokens, chunk in _kinds(rows, length, dim, chunk_size):
        chunks = tokens // chunk
        inside, between = chunks * chunk * chunk * dim, (chunks + 1) ** 2 * (dim + 1)
        total += 2 * number * count * (inside + between)
    return total


class _Rows:
    """Scores and running maxima as rows (R, N), and the weights that follow from them."""

    def __init__(self, scores: Tensor, m: Tensor, maximum: Tensor) -> None:
        self.scores, self.m, self.first = scores.flatten(0, 1), m.flatten(0, 1), maximum.flatten()
        self.base = finite(self.m)  # what is subtracted from scores

    def pieces(self, dim: int, chunk_size: int) -> list[_Piece]:
        count, length = self.scores.shape
        return pieces(count, length, dim, chunk_size)

    def weights(self, piece: _Piece) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three sets of weights of a piece.

        Of pairs inside chunks, exp(s_j − m_i) for j <= i: (r, n, C, C). Of the states between
        chunks, (r, n + 1, n + 1): row t is the state before chunk t (the last: after them all),
        column 0 the state before the piece, column c + 1 what chunk c leaves behind. Of the state
        before a chunk at each of its tokens: (r, n, C).
        """
        s, b = piece.cut(self.scores), piece.cut(self.base)
        start = piece.part.start
        before = self.m[piece.rows, start - 1] if start else self.first[piece.rows]
        ends = torch.cat((before[:, None], piece.cut(self.m)[..., -1]), 1)
        pairs = (s[..., None, :] - b[..., None]).exp_().tril_()
        between = (ends[:, None, :] - finite(ends)[..., None]).exp_().tril_()
        return pairs, between, (ends[:, :-1, None] - b).exp_()


def _inverse(u: Tensor) -> Tensor:
    return torch.where(u > 0, 1 / u, 0)
