"""Gated linear attention by chunks: matrix products, a closed-form backward, O(N) memory.

B batch, H heads, n chunks, C tokens a chunk, c tokens a sub-chunk, D key dim, V value dim.

Inside a chunk the log decays are summed from its first token (b), so that sums stay small and
exact. The pair (i, j) is weighted by exp(b_i - b_j). It is factored as exp(b_i - r) exp(r - b_j)
around the middle row r where both exponents are within ``_SAFE``; a chunk with stronger decay is
cut into sub-chunks whose exponents are all <= 0 (off the diagonal) or taken pairwise (on it).
Nothing here can overflow, whatever the decay. Sequences are worked through in segments whose
temporaries stay in the processor's cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SEGMENT_NUMBERS", "gla_chunked"]

_SAFE = 30.0  # exp(30) leaves float32 its full precision on either side
_SUBCHUNK = 16
SEGMENT_NUMBERS = 1 << 18  # numbers in one (B, H, segment, D) temporary: 1 MiB in float32


def gla_chunked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    *,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, H, N, V) and the final memory (B, H, D, V).

    All tensors have one dtype (float32 or float64) and H heads.
    """
    out, final, _ = _forward_op(query, key, value, log_decay, memory, scale, chunk_size)
    return out, final


@torch.library.custom_op("manyheads::gla_chunked", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, dim = query.shape
    out = query.new_empty(batch, heads, length, value.shape[-1])
    chunks = -(-length // chunk_size)
    states = query.new_empty(batch, heads, chunks, dim, value.shape[-1])
    memory = memory.clone()
    for start, stop in _segments(batch * heads, length, dim, chunk_size):
        q, k, v, g = _chunks((query, key, value, log_decay), start, stop, chunk_size)
        b = g.cumsum(-2)
        total = b[..., -1:, :]
        added = (k * (total - b).exp()).mT @ v  # (B, H, n, D, V)
        decay = total.exp().mT  # (B, H, n, D, 1)
        first = start // chunk_size
        here = states[:, :, first : first + b.shape[2]]
        for i in range(b.shape[2]):
            here[:, :, i] = memory
            memory = torch.addcmul(added[:, :, i], decay[:, :, i], memory)
        q = q * scale
        scores = _scores(q, k, b)
        o = (q * b.exp()) @ here
        o += scores @ v
        out[:, :, start:stop] = o.flatten(2, 3)[:, :, : stop - start]
    return out, memory, states


@_forward_op.register_fake
def _(query, key, value, log_decay, memory, scale, chunk_size):  # type: ignore[no-untyped-def]
    batch, heads, length, dim = query.shape
    chunks = -(-length // chunk_size)
    return (
        query.new_empty(batch, heads, length, value.shape[-1]),
        torch.empty_like(memory),
        query.new_empty(batch, heads, chunks, dim, value.shape[-1]),
    )


@torch.library.custom_op("manyheads::gla_chunked_backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    states: Tensor,
    final: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Walk the segments backwards with the gradient of the memory.

    The gate needs no stored memory beyond one a chunk: with db = q·dq − k·dk, its gradient at t
    is the sum of db from t to the end of the chunk plus Σ_V S·dS at that end.
    """
    batch, heads, length, dim = query.shape
    grads = tuple(torch.empty_like(t) for t in (query, key, value, log_decay))
    carried, after = grad_final, final
    for start, stop in reversed(_segments(batch * heads, length, dim, chunk_size)):
        inputs = (query, key, value, log_decay, grad_out)
        q, k, v, g, do = _chunks(inputs, start, stop, chunk_size)
        q = q * scale
        b = g.cumsum(-2)
        total = b[..., -1:, :]
        decay, grown, left = total.exp().mT, b.exp(), (total - b).exp()
        first, count = start // chunk_size, b.shape[2]
        here = states[:, :, first : first + count]  # memory before each chunk

        added = (q * grown).mT @ do
        beyond = torch.empty_like(here)  # gradient of the memory after each chunk
        products = torch.empty_like(total)  # Σ_V S dS after each chunk
        for i in reversed(range(count)):
            beyond[:, :, i] = carried
            products[:, :, i, 0] = (after * carried).sum(-1)
            after = here[:, :, i]
            carried = torch.addcmul(added[:, :, i], decay[:, :, i], carried)

        grad_scores = (do @ v.mT).tril_()
        scores, dq, dk = _scores_backward(q, k, b, grad_scores)
        dv = scores.mT @ do
        dv += (k * left) @ beyond
        dq += (do @ here.mT).mul_(grown)
        dk += (v @ beyond.mT).mul_(left)
        db = q * dq - k * dk
        dg = db.flip(-2).cumsum(-2).flip(-2) + products
        for whole, part in zip(grads, (dq.mul_(scale), dk, dv, dg), strict=True):
            whole[:, :, start:stop] = part.flatten(2, 3)[:, :, : stop - start]
    return grads[0], grads[1], grads[2], grads[3], carried.clone()


@_backward_op.register_fake
def _(query, key, value, log_decay, states, final, *rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t) for t in (query, key, value, log_decay, final))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, log_decay, _, ctx.scale, ctx.chunk_size = inputs
    _, final, states = output
    ctx.mark_non_differentiable(states)
    ctx.save_for_backward(query, key, value, log_decay, states, final)


def _backward(ctx, grad_out, grad_final, _):  # type: ignore[no-untyped-def]
    grads = _backward_op(
        *ctx.saved_tensors, grad_out.contiguous(), grad_final, ctx.scale, ctx.chunk_size
    )
    return (*grads, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def _segments(rows: int, length: int, dim: int, chunk_size: int) -> list[tuple[int, int]]:
    chunks = max(1, SEGMENT_NUMBERS // (rows * dim * chunk_size))
    size = chunks * chunk_size
    return [(a, min(a + size, length)) for a in range(0, length, size)]


def _chunks(
    tensors: tuple[Tensor, ...], start: int, stop: int, chunk_size: int
) -> tuple[Tensor, ...]:
    """Cut tokens start:stop to (B, H, n, C, ·); zeros fill the last chunk and change nothing."""
    missing = -(stop - start) % chunk_size
    parts = (t[:, :, start:stop] for t in tensors)
    padded = (torch.nn.functional.pad(t, (0, 0, 0, missing)) if missing else t for t in parts)
    return tuple(t.unflatten(2, (-1, chunk_size)) for t in padded)


def _middle(b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middle row of each chunk and which chunks are too strong to factor around it."""
    r = b[..., b.shape[-2] // 2, None, :]
    reach = torch.maximum(b[..., :1, :] - r, r - b[..., -1:, :])
    return r, (reach > _SAFE).any(-1).squeeze(-1)  # (B, H, n)


def _scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """Return Σ_d q_i k_j exp(b_i − b_j) for j <= i inside each chunk: (B, H, n, C, C)."""
    r, strong = _middle(b)
    scores = ((q * (b - r).exp()) @ (k * (r - b).exp()).mT).tril_()
    if strong.any():
        scores[strong] = _strong_scores(q[strong], k[strong], b[strong])
    return scores


def _scores_backward(
    q: Tensor, k: Tensor, b: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores again and their gradients for q and k; ``grad`` is lower triangular."""
    r, strong = _middle(b)
    up, down = (b - r).exp(), (r - b).exp()
    qs, ks = q * up, k * down
    scores = (qs @ ks.mT).tril_()
    dq, dk = (grad @ ks).mul_(up), (grad.mT @ qs).mul_(down)
    if strong.any():
        qs, ks, bs, gs = q[strong], k[strong], b[strong], grad[strong]
        scores[strong] = _strong_scores(qs, ks, bs)
        dq[strong], dk[strong] = _strong_scores_backward(qs, ks, bs, gs)
    return scores, dq, dk


def _blocks(b: Tensor) -> list[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Return, for each sub-chunk of strong chunks b (m, C, D), how its rows are weighted.

    Each item: its rows, the columns before them, row weights (m, c, D), column weights
    (m, ·, D), both at most 1, and the pairwise weights of its diagonal block (m, c, c, D).
    """
    size = b.shape[1]
    items = []
    for start in range(0, size, _SUBCHUNK):
        rows, before = slice(start, min(start + _SUBCHUNK, size)), slice(0, start)
        own = b[:, rows]
        r = own[:, :1]
        count = own.shape[1]
        lower = torch.ones(count, count, dtype=torch.bool, device=b.device).tril()[..., None]
        gap = (own[:, :, None] - own[:, None]).masked_fill(~lower, -torch.inf)
        items.append((rows, before, (own - r).exp(), (r - b[:, before]).exp(), gap.exp()))
    return items


def _strong_scores(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    scores = q.new_zeros(q.shape[0], q.shape[1], q.shape[1])
    for part in _parts(q):
        for rows, before, up, down, pairs in _blocks(b[part]):
            qi, kj = q[part, rows], k[part, rows]
            scores[part, rows, before] = (qi * up) @ (k[part, before] * down).mT
            scores[part, rows, rows] = torch.einsum("mid,mjd,mijd->mij", qi, kj, pairs)
    return scores


def _strong_scores_backward(q: Tensor, k: Tensor, b: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dq, dk = torch.zeros_like(q), torch.zeros_like(k)
    for part in _parts(q):
        for rows, before, up, down, pairs in _blocks(b[part]):
            qi, kj = q[part, rows], k[part, rows]
            off, diagonal = grad[part, rows, before], grad[part, rows, rows]
            weighted = diagonal[..., None] * pairs
            dq[part, rows] = (off @ (k[part, before] * down)) * up
            dq[part, rows] += torch.einsum("mijd,mjd->mid", weighted, kj)
            dk[part, before] += (off.mT @ (qi * up)) * down
            dk[part, rows] += torch.einsum("mijd,mid->mjd", weighted, qi)
    return dq, dk


def _parts(q: Tensor) -> list[slice]:
    """Bound the pairwise tensors (m, c, c, D) of strong chunks."""
    step = max(1, 4 * SEGMENT_NUMBERS // (_SUBCHUNK * _SUBCHUNK * q.shape[-1]))
    return [slice(a, a + step) for a in range(0, q.shape[0], step)]
