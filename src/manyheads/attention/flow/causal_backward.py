"""The gradients of causal flow attention in closed form: one sweep from the last tile to the first.

B batch, H heads, n chunks, C tokens a chunk, D key dim, V value dim; d_x is the gradient of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.flow.parts import bounded, cut_numbers, cut_tile, dot, weighted_sum
from manyheads.layers.linear import cache_tiles
from manyheads.layers.precision import without_autocast

__all__ = ["flow_causal_backward"]


@torch.library.custom_op("manyheads::flow_causal_backward", mutates_args=())
@without_autocast
def flow_causal_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    number: Tensor,
    mask: Tensor | None,
    competition: Tensor,
    out: Tensor,
    last: Tensor,
    states: Tensor,
    numbers: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    grad_last: Tensor,
    squash: bool,
    eps: float,
    clamp: float | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, key, value, state and competition.

    ``left_q`` and ``left_k`` hold, beside the values' V columns, the factors of the flows: their
    first V + 2 columns make the gradient of the lower triangle of the scores, the last two that
    of the upper one. ``beyond`` is the gradient of the state after each chunk, in its layout.
    """
    grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
    grad_state, width = grad_final.clone(), value.shape[-1]
    # Σ over later tokens of (d_strength · strength / their sum of exp): logs of its two signs.
    later = [(-grad_last).clamp_min(0).log() - last, grad_last.clamp_min(0).log() - last]
    for rows, spans in cache_tiles(query, chunk_size):
        carried, pending = grad_state[rows], [t[rows] for t in later]
        for span in reversed(spans):
            q, k, v, n, real, (o, do) = cut_tile(
                (query, key, value, out, grad_out), number, mask, rows, span,
                chunk_size=chunk_size, squash=squash,
            )  # fmt: skip
            incoming, outgoing, allocation, conserved, sums = cut_numbers(
                numbers, rows, span, chunk_size=chunk_size
            )
            first, count = span[0] // chunk_size, k.shape[2]
            before = states[rows, :, first : first + count]
            beyond = torch.empty_like(before)
            scores = q @ k.mT
            lower, upper = scores.tril(), scores.triu_()
            r, s = n / outgoing, n / incoming
            force = bounded(conserved, clamp, real)
            strength = (force - sums).exp_().mul_(n)
            if real is not None:
                strength *= real

            left_q, left_k = (t.new_empty(*t.shape[:-1], width + 4) for t in (q, k))
            g = torch.mul(do, (allocation / incoming)[..., None], out=left_q[..., :width])
            torch.mul(v, strength[..., None], out=left_k[..., :width])
            read = (do * o).sum(-1)
            d_sink = read * (1 - allocation) / n  # of n times the conserved sink

            added, memory = q.mT @ g, carried[..., :width]
            for i in reversed(range(count)):
                beyond[:, :, i, :, :width] = memory
                memory += added[:, :, i]
            d_weighted = (lower.mT @ g).add_(k @ beyond[..., :width])
            pull = strength * (d_weighted * v).sum(-1)
            d_value = d_weighted.mul_(strength[..., None])
            d_source = pull + _competition(pull, force, sums, pending)
            if clamp is not None:
                d_source *= conserved.abs() <= clamp
            d_source /= n  # of n times the conserved source

            key_flow = _beyond(weighted_sum(d_sink, q, eps), carried, beyond, width + 1)
            query_flow = _beyond(weighted_sum(d_source, k, eps), carried, beyond, width + 3)
            sink_rest, source_rest = _from_here(d_sink), _from_here(d_source)
            d_r = dot(k, key_flow).add_(weighted_sum(d_sink, lower))
            d_r.addcmul_(k.sum(-1), sink_rest, value=eps)
            d_s = dot(q, query_flow).add_(weighted_sum(d_source, upper.mT))
            d_s.addcmul_(q.sum(-1), source_rest, value=eps)
            d_incoming = -(read + d_s * s) / incoming
            d_outgoing = -d_r * r / outgoing
            _beyond(weighted_sum(d_incoming, q, eps), carried, beyond, width)
            _beyond(weighted_sum(d_outgoing, k, eps), carried, beyond, width + 2)

            left_q[..., width + 2] = left_k[..., width] = 1
            for i, t in ((0, d_incoming), (1, d_sink), (3, s)):
                left_q[..., width + i] = t
            for i, t in ((1, r), (2, d_outgoing), (3, d_source)):
                left_k[..., width + i] = t
            d_scores = (left_q[..., : width + 2] @ left_k[..., : width + 2].mT).tril_()
            d_upper = torch.addcmul(d_outgoing[..., None, :], s[..., None], d_source[..., None, :])
            d_scores += d_upper.triu_()
            # What a token meets outside its chunk: sums before it, gradients of sums after it.
            flows = before[..., width:] + eps
            meets_q = torch.cat((before[..., :width], flows[..., :2], beyond[..., width + 2 :]), -1)
            meets_k = torch.cat((beyond[..., : width + 2], flows[..., 2:]), -1)
            d_q = (d_scores @ k).add_(left_q @ meets_q.mT)
            d_q.add_((s * source_rest + _from_here(d_outgoing))[..., None], alpha=eps)
            d_k = (d_scores.mT @ q).add_(left_k @ meets_k.mT)
            d_k.add_((r * sink_rest + _from_here(d_incoming))[..., None], alpha=eps)
            if real is not None:
                d_q *= real[..., None]
                d_k *= real[..., None]
            if squash:
                d_q = torch.ops.aten.sigmoid_backward(d_q, q)
                d_k = torch.ops.aten.sigmoid_backward(d_k, k)
            start, stop = span
            for whole, part in ((grad_query, d_q), (grad_key, d_k), (grad_value, d_value)):
                whole[rows, :, start:stop] = part.flatten(2, 3)[:, :, : stop - start]
    grad_competition = (competition + later[1]).exp() - (competition + later[0]).exp()
    return grad_query, grad_key, grad_value, grad_state, grad_competition


@flow_causal_backward.register_fake
def _(query, key, value, number, mask, competition, *rest):  # type: ignore[no-untyped-def]
    grad_final = rest[5]
    return tuple(torch.empty_like(t) for t in (query, key, value, grad_final, competition))


def _beyond(sums: Tensor, carried: Tensor, beyond: Tensor, column: int) -> Tensor:
    """Turn sums of chunks (B, H, n, D) into those of the chunks after each.

    They go into a column of ``beyond``; the column of ``carried`` moves to before the tile.
    """
    carry = carried[..., column]
    starts = sums.flip(2).cumsum(2).flip(2).add_(carry[:, :, None])
    ends = torch.cat((starts[:, :, 1:], carry[:, :, None]), 2)
    carry.copy_(starts[:, :, 0])
    beyond[..., column] = ends
    return ends


def _from_here(x: Tensor) -> Tensor:
    """Sum from each token to the end of its chunk."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _competition(pull: Tensor, force: Tensor, sums: Tensor, pending: list[Tensor]) -> Tensor:
    """Return −Σ_{s>=t} pull_s exp(force_t − sums_s), and move ``pending`` to this tile's start.

    The two signs are summed apart, as logs, so that no exponential of a large flow is ever made.
    """
    parts = []
    for sign, carry in zip((1, -1), pending, strict=True):
        logs = (sign * pull).clamp_min(0).log().sub_(sums).flatten(2)
        total = torch.logaddexp(logs.flip(-1).logcumsumexp(-1).flip(-1), carry[..., None])
        carry.copy_(total[..., 0])
        parts.append((total.view_as(force) + force).exp_())
    return parts[1] - parts[0]
