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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["block_pairs", "block_rows", "urpe_blocked"]

_NUMBERS = 1 << 19  # scores of a block
_LEAST_ROWS, _MOST_ROWS = 32, 128
_FEW_PAIRS = 8


def block_rows(keys: int) -> int:
    """Return the query rows of a block that sees that many keys."""
    return max(_LEAST_ROWS, min(_MOST_ROWS, _NUMBERS // max(keys, 1)))


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


class _Block(NamedTuple):
    """Examples, heads and query rows of a block, and how many keys it sees."""

    examples: slice
    heads: slice
    rows: slice
    keys: int


def _blocks(
    batch: int, heads: int, length: int, keys: int, is_causal: bool, offset: int
) -> Iterator[_Block]:
    rows = min(block_rows(keys), length)
    pairs = max(1, _NUMBERS // (rows * keys))
    some, several = max(1, min(batch, pairs // heads)), min(heads, pairs)
    for b in range(0, batch, some):
        for h in range(0, heads, several):
            for a in range(0, length, rows):
                e = min(a + rows, length)
                yield _Block(
                    slice(b, min(b + some, batch)),
                    slice(h, min(h + several, heads)),
                    slice(a, e),
                    min(keys, e + offset) if is_causal else keys,
                )


class _Problem:
    """The inputs of one call, cut into blocks."""

    def __init__(
        self,
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
    ) -> None:
        self.query, self.key, self.value = (t.contiguous() for t in (query, key, value))
        self.bias = None if bias is None else bias.contiguous()
        self.multiplier = None if multiplier is None else multiplier.contiguous()
        self.mask, self.scale, self.offset = mask, scale, offset
        self.is_causal, self.dropout_p = is_causal, dropout_p
        # Rows are turned round wherever a table is read along its diagonals.
        self.turned = any(f is not None and f.ndim == 2 for f in (bias, multiplier))
        self.may_be_empty = mask is not None or (
            bias is not None and (bias.ndim > 2 or bool(torch.isneginf(bias).any()))
        )
        self.generator: torch.Generator | None = None
        if seed is not None:
            self.generator = torch.Generator(query.device).manual_seed(int(seed))

    def blocks(self) -> list[_Block]:
        batch, heads, length, _ = self.query.shape
        keys = self.key.shape[2]
        if length == 0 or keys == 0:
            return []
        return list(_blocks(batch, heads, length, keys, self.is_causal, self.offset))

    def turn(self, x: Tensor) -> Tensor:
        return x.flip(2) if self.turned else x

    def rows(self, x: Tensor, block: _Block) -> Tensor:
        """Cut (B, H, N, ·) to the rows of a block: (G, r, ·), in the block's order."""
        return self.turn(x[block.examples, block.heads, block.rows]).flatten(0, 1)

    def keys(self, x: Tensor, block: _Block) -> Tensor:
        """Cut contiguous (B, H, M, ·) to the keys of a block, as a view: (G, m, ·)."""
        part = x[block.examples, block.heads, : block.keys]
        return part.view(-1, block.keys, x.shape[-1])

    def start(self, factor: Tensor, block: _Block) -> int:
        """Return the column of a table that the block's first row and key meet."""
        return factor.shape[1] // 2 - (block.rows.stop - 1 + self.offset)

    def tile(self, factor: Tensor, block: _Block) -> Tensor:
        """Return what a block reads of a factor, broadcastable to (b, h, r, m)."""
        count = block.rows.stop - block.rows.start
        if factor.ndim == 2:
            table = factor if factor.shape[0] == 1 else factor[block.heads]
            width = factor.shape[1]
            return table.as_strided(
                (1, table.shape[0], count, block.keys),
                (0, width, 1, 1),
                table.storage_offset() + self.start(factor, block),
            )
        return self.turn(_matrix_part(factor, block))

    def weights(self, block: _Block, scratch: Tensor) -> Tensor:
        """Return the softmax of a block, (b, h, r, m), in scratch memory."""
        query = self.rows(self.query, block) * self.scale
        key = self.keys(self.key, block)
        b = block.examples.stop - block.examples.start
        p = scratch[: query.shape[0] * query.shape[1] * block.keys].view(b, -1, *_inner(query, key))
        flat = p.flatten(0, 1)
        if self.bias is None:
            torch.bmm(query, key.mT, out=flat)
        else:
            p.copy_(self.tile(self.bias, block))
            flat.baddbmm_(query, key.mT)
        if self.mask is not None:
            hidden = ~self.mask[block.examples, None, None, : block.keys]
            p.masked_fill_(hidden, -torch.inf)
        first = block.rows.start + self.offset  # the first place that some row may not see
        if self.is_causal and block.keys > first + 1:
            count, seen = p.shape[2], block.keys - first
            later = torch.ones(count, seen, dtype=torch.bool, device=p.device).triu_(1)
            p[..., first:].masked_fill_(later.flip(0) if self.turned else later, -torch.inf)
        empty = torch.isneginf(p.amax(-1, keepdim=True)) if self.may_be_empty else None
        if p.device.type == "cpu":
            torch.softmax(p, -1, out=p)
        else:
            p = torch.softmax(p, -1)
        return p if empty is None else p.masked_fill_(empty, 0)

    def kept(self, like: Tensor) -> Tensor:
        """Draw the dropout factors of a block; blocks must come in order."""
        keep = 1 - self.dropout_p
        drawn = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return drawn.bernoulli_(keep, generator=self.generator).div_(keep)


def _inner(query: Tensor, key: Tensor) -> tuple[int, int]:
    return query.shape[1], key.shape[1]


def _matrix_part(factor: Tensor, block: _Block) -> Tensor:
    """Cut a matrix, or its gradient, to a block, axes of size 1 whole: (b or 1, h or 1, r, m)."""
    matrix = factor if factor.ndim == 4 else factor[None]
    examples = block.examples if matrix.shape[0] > 1 else slice(None)
    heads = block.heads if matrix.shape[1] > 1 else slice(None)
    return matrix[examples, heads, block.rows, : block.keys]


def _pairs(block: _Block) -> int:
    """Return how many pairs of example and head a block holds."""
    return (block.examples.stop - block.examples.start) * (block.heads.stop - block.heads.start)


def _largest(blocks: list[_Block], *, extra: bool = False) -> int:
    """Return the numbers of the largest block, with r zeros behind each row if ``extra``."""
    sizes = (
        _pairs(k) * (r := k.rows.stop - k.rows.start) * (k.keys + (r if extra else 0))
        for k in blocks
    )
    return max(sizes, default=0)


def block_pairs(batch: int, heads: int, length: int, *, is_causal: bool) -> tuple[int, int]:
    """Return how many query-key pairs all blocks of a self-attention hold, and the largest one.

    In closed form: lengths that no memory holds can be asked for.
    """
    if length == 0:
        return 0, 0
    rows = min(block_rows(length), length)
    whole, rest = divmod(length, rows)
    inner = max(1, _NUMBERS // (rows * length))
    together = max(1, min(batch, inner // heads)) * min(heads, inner)
    if not is_causal:
        return batch * heads * length * length, together * rows * length
    pairs = rows * rows * whole * (whole + 1) // 2 + rest * length
    return batch * heads * pairs, together * max(rows * rows * whole, rest * length)


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
        p = _Problem(
            query, key, value, bias, multiplier, mask, seed, scale, is_causal, offset, dropout_p
        )
        blocks = p.blocks()
        out = query.new_zeros(*query.shape[:3], value.shape[-1])
        scratch = query.new_empty(_largest(blocks))
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
        p = _Problem(
            query, key, value, bias, multiplier, mask, seed, scale, is_causal, offset, dropout_p
        )
        blocks = p.blocks()
        dq = query.new_zeros(query.shape)
        dk, dv = key.new_zeros(key.shape), value.new_zeros(value.shape)
        db = query.new_zeros(bias.shape if bias is not None and wants_bias else 0)
        dc = query.new_zeros(multiplier.shape if multiplier is not None and wants_multiplier else 0)
        delta = (grad_out * out).sum(-1, keepdim=True)
        skewed = db.ndim == 2 or dc.ndim == 2
        scratch = query.new_empty(_largest(blocks))
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

    def __init__(self, like: Tensor, blocks: list[_Block], skewed: bool) -> None:
        self.skewed = skewed
        self.memory = like.new_empty(_largest(blocks, extra=skewed))
        # A product of many small matrices is slow into rows with room between them: it goes to
        # memory of its own, and is copied for the sums.
        pairs = max((_pairs(block) for block in blocks), default=0)
        self.plain = like.new_empty(_largest(blocks)) if skewed and pairs > _FEW_PAIRS else None
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


def _add_to_factor(grad: Tensor, x: Tensor, store: _Skewed, block: _Block, p: _Problem) -> None:
    """Add a block's gradient (b, h, r, m) to that of the table or matrix it came from."""
    if grad.ndim == 2:
        sums = store.diagonal_sums(x).sum(0)
        start = p.start(grad, block)
        part = grad if grad.shape[0] == 1 else grad[block.heads]
        part[:, start : start + sums.shape[1]] += sums if len(part) > 1 else sums.sum(0)
        return
    part = _matrix_part(grad, block)
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
