"""The verb ``draw``: which blocks of an attention matrix a mask or mechanism computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.config import Config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DrawOptions", "block_map_of", "run"]

_KINDS = ("sla", "routing", "local", "landmark", "causal", "window", "prefix", "documents")
_DRAWN = ("sla", "routing", "landmark")  # for tokens of 8 kinds, in runs of a block


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawOptions(Config):
    """What to draw, and where to.

    Attributes:
        what: what a mechanism computes of tokens of 8 kinds (sla, routing: tokens sorted by
            cluster, landmark: what is fetched from a memory), or a mask: local (heads beside
            routing ones), causal, window, prefix or documents.
        out: the PNG to write; "none" prints the text alone.
        length: tokens.
        block: tokens a block.
        window: tokens before the query that a window holds, or before a block that local does;
            of routing: tokens of a cluster that a query sees.
        prefix: tokens of the prefix that all attend to.
        documents: documents of equal length, packed.
        topk: share of the blocks that sla computes, or landmark fetches.
        cell: pixels a block.
        seed: of the tokens that a mechanism is drawn for.
    """

    what: str = field(metadata={"positional": True, "choices": _KINDS})
    out: str = "map.png"
    length: int = 1024
    block: int = 64
    window: int = 256
    prefix: int = 256
    documents: int = 4
    topk: float = 0.2
    cell: int = 12
    seed: int = 0


def run(options: DrawOptions) -> int:
    """Print the map as text and write it as a picture.

    Raises:
        ValueError: an option is out of its range, or the file cannot be written.
    """
    from manyheads.attention.block_sparse import block_text, draw_block_map

    blocks = block_map_of(options)
    out = None if options.out == "none" else Path(options.out)
    try:
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
        draw_block_map(blocks, path=out, cell=options.cell)
    except OSError as error:
        raise ValueError(
            f"out {options.out!r} cannot be written ({error.strerror or error}): give another "
            "file with --out"
        ) from None
    left_out = blocks != 1 if options.what == "sla" else blocks == -1
    by = " by softmax" if options.what == "sla" else ""
    print(block_text(blocks))
    print(f"\n{options.what}, {options.length:,} tokens in blocks of {options.block}: "
          f"{left_out.double().mean():.1%} of the blocks are not computed{by}")  # fmt: skip
    if out is not None:
        print(f"written: {out}")
    return 0


def block_map_of(options: DrawOptions) -> Tensor:
    """Return the map (1, 1, P, Q): 1 whole, 0 in part (of sla: linear only), -1 not at all.

    Raises:
        ValueError: an option is out of its range.
    """
    import torch

    from manyheads.attention import (
        and_masks,
        causal_mask,
        create_block_mask,
        document_mask,
        prefix_lm_mask,
        sliding_window_mask,
    )
    from manyheads.attention.routing import local_block_mask

    for name in ("length", "block", "documents"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    length, block = options.length, options.block
    if options.what in _DRAWN:
        return _of_mechanism(options)
    if options.what == "local":
        return local_block_mask(
            length, block=block, flange=options.window, is_causal=True
        ).block_map()
    masks = {
        "causal": causal_mask,
        "window": sliding_window_mask(options.window),
        "prefix": prefix_lm_mask(options.prefix),
        "documents": and_masks(
            causal_mask, document_mask(torch.arange(length) * options.documents // length)
        ),
    }
    mask = create_block_mask(masks[options.what], None, None, length, length, block)
    return mask.block_map()


def _of_mechanism(options: DrawOptions) -> Tensor:
    """Return what a mechanism computes of tokens of 8 kinds, those of a block alike."""
    import torch

    from manyheads.attention import sla_parts
    from manyheads.attention.routing import routing_block_mask

    length, block = options.length, options.block
    generator = torch.Generator().manual_seed(options.seed)
    centres = torch.randn(8, 64, generator=generator)
    runs = torch.randint(8, (-(-length // block),), generator=generator)
    tokens = centres[runs].repeat_interleave(block, 0)[:length]
    q, k = (tokens + 0.7 * torch.randn(length, 64, generator=generator) for _ in range(2))
    q, k = q[None, None], k[None, None]
    if options.what == "sla":
        return sla_parts(q, k, k, topk=options.topk, block_q=block, block_k=block).block_map
    if options.what == "routing":
        found = routing_block_mask(q, q, centres[None], window=options.window, block_size=block)
        return found.block_mask.block_map()
    return _fetched(q, k, block, options.topk)


def _fetched(q: Tensor, k: Tensor, block: int, share: float) -> Tensor:
    """Return the blocks that each block of queries fetches from all before it, its own in part."""
    import torch

    from manyheads.attention import LandmarkMemory

    if block < 2:
        raise ValueError(f"block {block} must be at least 2: a token and its landmark")
    if not 0 < share <= 1:
        raise ValueError(f"topk {share} must lie in (0, 1]: a share of the blocks")
    rows = -(-q.shape[2] // block)
    memory = LandmarkMemory(
        block_size=block, top_k=max(1, round(share * rows)), selection="max_over_tokens",
        rotary_theta=None,
    )  # fmt: skip
    found = torch.full((1, 1, rows, rows), -1, dtype=torch.int8)
    for row, (queries, keys) in enumerate(zip(q.split(block, 2), k.split(block, 2), strict=True)):
        if memory.stored:
            found[0, 0, row, memory.select(queries).flatten()] = 1
        found[0, 0, row, row] = 0
        memory.append(keys, keys)
    return found
