"""The verb ``draw``: which blocks of an attention matrix a mask or mechanism computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from manyheads.config import Config

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DrawOptions", "block_map_of", "run"]

_KINDS = ("sla", "causal", "window", "prefix", "documents")


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawOptions(Config):
    """What to draw, and where to.

    Attributes:
        what: sla (of clustered tokens), or a mask: causal, window, prefix or documents.
        out: the PNG to write; "none" prints the text alone.
        length: tokens.
        block: tokens a block.
        window: tokens before the query that a window holds.
        prefix: tokens of the prefix that all attend to.
        documents: documents of equal length, packed.
        topk: share of the blocks that sla computes.
        cell: pixels a block.
        seed: of the tokens that sla is drawn for.
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
        sla_parts,
        sliding_window_mask,
    )

    for name in ("length", "block", "documents"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    length, block = options.length, options.block
    if options.what == "sla":
        generator = torch.Generator().manual_seed(options.seed)
        centres = torch.randn(8, 64, generator=generator)
        runs = torch.randint(8, (-(-length // block),), generator=generator)
        tokens = centres[runs].repeat_interleave(block, 0)[:length]
        q, k = (tokens + 0.7 * torch.randn(length, 64, generator=generator) for _ in range(2))
        parts = sla_parts(
            q[None, None], k[None, None], k[None, None], topk=options.topk, block_q=block,
            block_k=block,
        )  # fmt: skip
        return parts.block_map
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
