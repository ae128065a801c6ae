"""URPE attention by blocks of query rows: matrix products, a closed-form backward, O(N) memory.

B batch, H heads, N queries, M keys, D head dim, V value dim; r rows of a block, m keys it sees.

A block holds r x m scores of a few heads. Its softmax is computed whole, in one fused pass, so
that nothing but the output is kept for the backward, which computes the block again. With
A = C ∘ P and X = P ∘ (dO Vᵀ):  dC = X,  dS = C ∘ X − P · Σ(dO ∘ O).

A table of relative values is never expanded. With the rows of a block in reverse order, the
matrix t[j − i] becomes t[const + row + column], which is a view of the table (both strides 1),
and the gradient of the table, a sum along diagonals, becomes a sum over the rows of a view: a
block stored with row length m + r, zeros behind column m, is read with row length m + r − 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention.urpe.blocks import (
    Block,
    Problem,
    largest_block,
    matrix_part,
    pair_count,
)

__all__ = ["urpe_blocked"]

_FEW_PAIRS = 8


def urpe_blocked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    is_causal: bool,
    offset: int = 0,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return (C ∘ softmax(scale · Q Kᵀ + B)) V, (B, H, N, V).

    All floating-point tensors have one dtype (float32 or float64); query, key and value have H
    heads. ``mask`` (B, M) is True at keys that count, ``offset`` is the place of the first query.
    """
    seed = None
    if dropout_p > 0:
        seed = torch.randint(1 << 62, (), device="cpu")
    return _forward_op(
        query, key, value, bias, multiplier, mask, seed, scale, is_causal, offset, dropout_p
    )


@torch.library.custom_op("manyheads::urpe_blocked", mutates_args=())
def _forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    scale: float,
    is_causal: bool,
    offset: int,
    dropout_p: float,
) -> Tensor:
    with torch.autocast(query.device.type, enabled=False):
        p = Problem(
            query, key, value, bias, multiplier, mask, seed, scale, is_causal, offset, dropout_p
        )
        blocks = p.blocks()
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        scratch = query.new_empty(largest_block(blocks))
        for block in blocks:
            a = p.weights(block, scratch)
            if p.multiplier is not None:
                a.mul_(p.tile(p.multiplier, block))
            if seed is not None:
                a.mul_(p.kept(a))
            o = torch.bmm(a.flatten(0, 1), p.keys(p.value, block))
            part = out[block.examples, block.heads, block.rows]
            part.copy_(p.turn(o.view(part.shape)))
    return out


@_forward_op.register_fake
def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("manyheads::urpe_blocked_backward", mutates_args=())
def _backward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    grad_out: Tensor,
    scale: float,
    is_causal: bool,
    offset: int,
    dropout_p: float,
    wants_bias: bool,
    wants_multiplier: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        p = Problem(
            query, key, value, bias, multiplier, mask, seed, scale, is_causal, offset, dropout_p
        )
        blocks = p.blocks()
        dq = query.new_zeros(query.shape)
        dk, dv = key.new_zeros(key.shape), value.new_zeros(value.shape)
        db = query.new_zeros(bias.shape if bias is not None and wants_bias else 0)
        dc = query.new_zeros(multiplier.shape if multiplier is not None and wants_multiplier else 0)
        delta = (grad_out * out).sum(-1, keepdim=True)
        skewed = db.ndim == 2 or dc.ndim == 2
        scratch = query.new_empty(largest_block(blocks))
        store = _Skewed(query, blocks, skewed)
        for block in blocks:
            a = p.weights(block, scratch)
            do = p.rows(grad_out, block)
            x = store.block(a.shape)
            torch.bmm(do, p.keys(p.value, block).mT, out=x.flatten(0, 1))
            kept = None
            if seed is not None:
                kept = p.kept(a)
                x.mul_(kept)
            x.mul_(a)
            if dc.numel():
                _add_to_factor(dc, x, store, block, p)
            sums = p.turn(delta[block.examples, block.heads, block.rows])
            if p.multiplier is None:
                x.addcmul_(a, sums, value=-1)
            else:
                c = p.tile(p.multiplier, block)
                x.mul_(c).addcmul_(a, sums, value=-1)
                a.mul_(c)
            if kept is not None:
                a.mul_(kept)
            p.keys(dv, block).baddbmm_(a.flatten(0, 1).mT, do)
            if db.numel():
                _add_to_factor(db, x, store, block, p)
            ds, q = x.flatten(0, 1), p.rows(p.query, block)
            p.keys(dk, block).baddbmm_(ds.mT, q, alpha=scale)
            part = dq[block.examples, block.heads, block.rows]
            moved = torch.bmm(ds, p.keys(p.key, block)).mul_(scale)
            part.copy_(p.turn(moved.view(part.shape)))
    return dq, dk, dv, db, dc


@_backward_op.register_fake
def _(query, key, value, bias, multiplier, mask, seed, out, grad_out, *rest):  # type: ignore[no-untyped-def]
    *_, wants_bias, wants_multiplier = rest
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        query.new_empty(bias.shape if bias is not None and wants_bias else 0),
        query.new_empty(multiplier.shape if multiplier is not None and wants_multiplier else 0),
    )


class _Skewed:
    """Scratch memory of a block whose diagonals can be read as columns."""

    def __init__(self, like: Tensor, blocks: list[Block], skewed: bool) -> None:
        self.skewed = skewed
        self.memory = like.new_empty(largest_block(blocks, extra=skewed))
        # A product of many small matrices is slow into rows with room between them: it goes to
        # memory of its own, and is copied for the sums.
        pairs = max((pair_count(block) for block in blocks), default=0)
        self.plain = (
            like.new_empty(largest_block(blocks)) if skewed and pairs > _FEW_PAIRS else None
        )
        self.shape: torch.Size | None = None

    def block(self, shape: torch.Size) -> Tensor:
        """Return room for (b, h, r, m) with unit stride along m."""
        if self.plain is not None:
            return self.plain[: shape.numel()].view(shape)
        return self._rows(shape) if self.skewed else self.memory[: shape.numel()].view(shape)

    def diagonal_sums(self, x: Tensor) -> Tensor:
        """Return sums over row + column of what :meth:`block` holds: (b, h, r + m − 1)."""
        if self.plain is not None:
            self._rows(x.shape).copy_(x)
        b, h, r, m = x.shape
        size, width = r * (m + r), m + r - 1
        view = self.memory.as_strided((b, h, r, width), (h * size, size, width, 1))
        return view.sum(2)

    def _rows(self, shape: torch.Size) -> Tensor:
        b, h, r, m = shape
        whole = self.memory[: b * h * r * (m + r)].view(b, h, r, m + r)
        if shape != self.shape:
            whole[..., m:] = 0  # stays 0: nothing but [..., :m] is ever written
            self.shape = shape
        return whole[..., :m]


def _add_to_factor(grad: Tensor, x: Tensor, store: _Skewed, block: Block, p: Problem) -> None:
    """Add a block's gradient (b, h, r, m) to that of the table or matrix it came from."""
    if grad.ndim == 2:
        sums = store.diagonal_sums(x).sum(0)
        start = p.start(grad, block)
        part = grad if grad.shape[0] == 1 else grad[block.heads]
        part[:, start : start + sums.shape[1]] += sums if len(part) > 1 else sums.sum(0)
        return
    part = matrix_part(grad, block)
    part += p.turn(x).sum_to_size(part.shape)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:7], output)
    ctx.options = inputs[7:]


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    *inputs, out = ctx.saved_tensors
    wants = [inputs[i] is not None and ctx.needs_input_grad[i] for i in (3, 4)]
    dq, dk, dv, db, dc = _backward_op(*inputs, out, grad_out.contiguous(), *ctx.options, *wants)
    db, dc = (g if w else None for g, w in zip((db, dc), wants, strict=True))
    return dq, dk, dv, db, dc, *(None,) * 6


_forward_op.register_autograd(_backward, setup_context=_setup_context)
