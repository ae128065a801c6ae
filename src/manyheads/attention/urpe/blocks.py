"""Softmax scores in blocks of query rows, for what does something to a softmax before V.

B batch, H heads, N queries, M keys, D head dim; r rows of a block, m keys it sees.

A block holds r x m scores of a few heads, whose softmax is computed whole, in one fused pass, in
scratch memory that all blocks share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Block",
    "Problem",
    "block_pairs",
    "block_rows",
    "cut_blocks",
    "largest_block",
    "matrix_part",
    "pair_count",
]

_NUMBERS = 1 << 19  # scores of a block
_LEAST_ROWS, _MOST_ROWS = 32, 128


def block_rows(keys: int) -> int:
    """Return the query rows of a block that sees that many keys."""
    return max(_LEAST_ROWS, min(_MOST_ROWS, _NUMBERS // max(keys, 1)))


class Block(NamedTuple):
    """Examples, heads and query rows of a block, and how many keys it sees."""

    examples: slice
    heads: slice
    rows: slice
    keys: int


def cut_blocks(
    batch: int, heads: int, length: int, keys: int, is_causal: bool, offset: int
) -> Iterator[Block]:
    rows = min(block_rows(keys), length)
    pairs = max(1, _NUMBERS // (rows * keys))
    some, several = max(1, min(batch, pairs // heads)), min(heads, pairs)
    for b in range(0, batch, some):
        for h in range(0, heads, several):
            for a in range(0, length, rows):
                e = min(a + rows, length)
                yield Block(
                    slice(b, min(b + some, batch)),
                    slice(h, min(h + several, heads)),
                    slice(a, e),
                    min(keys, e + offset) if is_causal else keys,
                )


class Problem:
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

    def blocks(self) -> list[Block]:
        batch, heads, length, _ = self.query.shape
        keys = self.key.shape[2]
        if length == 0 or keys == 0:
            return []
        return list(cut_blocks(batch, heads, length, keys, self.is_causal, self.offset))

    def turn(self, x: Tensor) -> Tensor:
        return x.flip(2) if self.turned else x

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """Cut (B, H, N, ·) to the rows of a block: (G, r, ·), in the block's order."""
        return self.turn(x[block.examples, block.heads, block.rows]).flatten(0, 1)

    def keys(self, x: Tensor, block: Block) -> Tensor:
        """Cut contiguous (B, H, M, ·) to the keys of a block, as a view: (G, m, ·)."""
        part = x[block.examples, block.heads, : block.keys]
        return part.view(-1, block.keys, x.shape[-1])

    def start(self, factor: Tensor, block: Block) -> int:
        """Return the column of a table that the block's first row and key meet."""
        return factor.shape[1] // 2 - (block.rows.stop - 1 + self.offset)

    def tile(self, factor: Tensor, block: Block) -> Tensor:
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
        return self.turn(matrix_part(factor, block))

    def weights(self, block: Block, scratch: Tensor) -> Tensor:
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


def matrix_part(factor: Tensor, block: Block) -> Tensor:
    """Cut a matrix, or its gradient, to a block, axes of size 1 whole: (b or 1, h or 1, r, m)."""
    matrix = factor if factor.ndim == 4 else factor[None]
    examples = block.examples if matrix.shape[0] > 1 else slice(None)
    heads = block.heads if matrix.shape[1] > 1 else slice(None)
    return matrix[examples, heads, block.rows, : block.keys]


def pair_count(block: Block) -> int:
    """Return how many pairs of example and head a block holds."""
    return (block.examples.stop - block.examples.start) * (block.heads.stop - block.heads.start)


def largest_block(blocks: list[Block], *, extra: bool = False) -> int:
    """Return the numbers of the largest block, with r zeros behind each row if ``extra``."""
    sizes = (
        pair_count(k) * (r := k.rows.stop - k.rows.start) * (k.keys + (r if extra else 0))
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
