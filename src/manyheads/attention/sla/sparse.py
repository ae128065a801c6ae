"""The sparse branch: each query block meets the key blocks of its row of a table, and no other.

Key blocks are gathered a few query blocks at a time, as many as fit the cache, so that the work
is batched matrix products. Backward in closed form from the saved log-sum-exp: scores are made
again, and nothing of N x M is held.

B batch, H heads, N queries, M keys, D head dim, V value dim, P query blocks, Q key blocks, n key
blocks that a query block meets.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.sla.blocks import cut, lengths_as_counts
from manyheads.layers.precision import without_autocast

__all__ = ["sparse_attention"]

_GATHERED_NUMBERS = 1 << 17  # of keys at once: half a megabyte stays in a core's cache


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    *,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Softmax over the tokens of the key blocks that the table lists.

    Args:
        query: (B, H, N, D), scaled.
        key, value: (B, H_kv, M, D and V), real tokens at the front.
        table: (B, H, P, n) numbers of key blocks; with ``lengths``, Q is a block without tokens.
        lengths: (B) real keys, or None for all.
        block_q, block_k: tokens a block.

    Returns:
        (B, H, N, V); a query without any key gives 0.
    """
    return _sparse_op(query, key, value, table, lengths, block_q, block_k)[0]


@torch.library.custom_op("manyheads::sla_sparse", mutates_args=())
@without_autocast
def _sparse_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    gathered = _Gathered(key, value, table, lengths, block_k)
    q = cut(query, block_q).flatten(0, 2)  # (BHP, block_q, D)
    out = q.new_empty(*q.shape[:2], value.shape[3])
    lse = q.new_empty(*q.shape[:2], 1)
    for rows, _, keys, values, bias in gathered:
        scores = torch.bmm(q[rows], keys.mT)
        if bias is not None:
            scores += bias
        # A row without a key has -inf throughout: its weights become 0, not NaN.
        top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
        total = scores.sub_(top).exp_().sum(-1, keepdim=True)
        total.masked_fill_(total == 0, 1)
        torch.div(torch.bmm(scores, values), total, out=out[rows])
        torch.add(top, total.log_(), out=lse[rows])
    return _joined(out, query), _joined(lse, query)


@_sparse_op.register_fake
def _(query, key, value, table, lengths, block_q, block_k):  # type: ignore[no-untyped-def]
    shape = query.shape[:3]
    return query.new_empty(*shape, value.shape[3]), query.new_empty(*shape, 1)


@torch.library.custom_op("manyheads::sla_sparse_backward", mutates_args=())
@without_autocast
def _sparse_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    table: Tensor,
    lengths: Tensor | None,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gathered = _Gathered(key, value, table, lengths, block_k)
    q, g, sums = (cut(t, block_q).flatten(0, 2) for t in (query, grad, lse))
    delta = cut((out * grad).sum(-1, keepdim=True), block_q).flatten(0, 2)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(gathered.key), torch.zeros_like(gathered.value)
    for rows, blocks, keys, values, bias in gathered:
        weights = torch.bmm(q[rows], keys.mT)
        if bias is not None:
            weights += bias
        weights.sub_(sums[rows]).exp_()
        dv.index_add_(0, blocks, torch.bmm(weights.mT, g[rows]).view(-1, *dv.shape[1:]))
        slope = torch.bmm(g[rows], values.mT).sub_(delta[rows]).mul_(weights)
        torch.bmm(slope, keys, out=dq[rows])
        dk.index_add_(0, blocks, torch.bmm(slope.mT, q[rows]).view(-1, *dk.shape[1:]))
    return _joined(dq, query), _whole(dk, key, gathered.blocks), _whole(dv, value, gathered.blocks)


@_sparse_backward_op.register_fake
def _(grad, query, key, value, *_):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, table, lengths, ctx.block_q, ctx.block_k = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, table, lengths)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, table, lengths = ctx.saved_tensors
    grads = _sparse_backward_op(
        grad, query, key, value, out, lse, table, lengths, ctx.block_q, ctx.block_k
    )
    return *grads, None, None, None, None


_sparse_op.register_autograd(_backward, setup_context=_context)


class _Gathered:
    """Keys and values in blocks, gathered as the rows of the table ask for them.

    ``key`` and ``value`` are (B · H_kv · blocks, block_k, D and V); ``blocks`` is Q, one more
    with ragged rows: the block without tokens that shorter rows are filled up with.
    """

    def __init__(
        self, key: Tensor, value: Tensor, table: Tensor, lengths: Tensor | None, block: int
    ) -> None:
        spare = int(lengths is not None)
        self.block = block
        self.key, self.value = (_blocks(t, block, spare) for t in (key, value))
        batch, heads, _, self.width = table.shape
        kv_heads = key.shape[1]
        self.blocks = self.key.shape[0] // (batch * kv_heads)
        own = torch.arange(batch * kv_heads, device=key.device).view(batch, kv_heads, 1, 1)
        own = own.repeat_interleave(heads // kv_heads, 1) * self.blocks
        self.index = (table + own).flatten(0, 2)  # (BHP, n)
        self.bias: Tensor | None = None
        if spare or key.shape[2] % block:
            counts = lengths_as_counts(lengths, key.shape[2], block, key)
            counts = F.pad(counts, (0, spare)).expand(batch, -1)
            places = torch.arange(block, device=key.device)
            absent = (places >= counts[..., None]).repeat_interleave(kv_heads, 0).flatten(0, 1)
            self.bias = key.new_zeros(absent.shape).masked_fill_(absent, -torch.inf)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
        """Yield rows, their blocks' numbers, (rows, n · block_k, D and V), and a bias or None."""
        tokens = self.width * self.block
        size = max(1, _GATHERED_NUMBERS // max(1, tokens * self.key.shape[-1]))
        for start in range(0, len(self.index), size):
            rows = slice(start, min(start + size, len(self.index)))
            blocks = self.index[rows].flatten()
            shape = (rows.stop - start, tokens, -1)
            keys, values = (t.index_select(0, blocks).view(shape) for t in (self.key, self.value))
            bias = None
            if self.bias is not None:
                bias = self.bias.index_select(0, blocks).view(rows.stop - start, 1, tokens)
            yield rows, blocks, keys, values, bias


def _blocks(x: Tensor, block: int, spare: int) -> Tensor:
    """(B, H, M, D) to (B · H · blocks, block, D), with empty blocks at each row's end."""
    y = cut(x, block)
    return (F.pad(y, (0, 0, 0, 0, 0, spare)) if spare else y).flatten(0, 2).contiguous()


def _whole(x: Tensor, like: Tensor, blocks: int) -> Tensor:
    """Undo :func:`_blocks`."""
    y = x.view(*like.shape[:2], blocks, *x.shape[1:]).flatten(2, 3)
    return y[:, :, : like.shape[2]].contiguous()


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """(B · H · P, block, V) to (B, H, N, V), without what filled up the last block."""
    y = x.view(*like.shape[:2], -1, *x.shape[1:]).flatten(2, 3)
    return y[:, :, : like.shape[2]].contiguous()
