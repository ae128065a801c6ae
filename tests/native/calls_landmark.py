"""Calls of landmark's kernel over streams that are apt to go wrong; for sanitizers too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from manyheads.attention.landmark import LandmarkMemory, attend_with_memory, native

# batch, heads, key heads, head dim, value dim, block size, tokens before, and the memory's options
STREAMS: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((1, 1, 1, 2, 1, 2, 5), {"top_k": 1}),
    ((2, 6, 2, 20, 33, 5, 204), {"top_k": 3, "selection": "max_over_heads"}),
    ((1, 4, 4, 63, 16, 7, 90), {"top_k": 50, "rotary_theta": None}),
    ((3, 8, 2, 64, 130, 16, 3000), {"top_k": 4, "rotary_interleaved": True}),
    ((2, 2, 1, 18, 5, 4, 120), {"top_k": 2, "capacity": 7, "positions": "exact"}),
    ((1, 2, 2, 8, 8, 6, 12), {"top_k": 2, "official_start": True}),
)


def stream(sizes: tuple[int, ...], options: dict[str, Any], *, seed: int = 0) -> Any:
    """A memory that has read, and the query, key and value of the next 9 tokens."""
    batch, heads, kv, dim, value_dim, size, before = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, length: int, width: int) -> torch.Tensor:
        return torch.randn(batch, count, length, width, generator=generator)

    memory = LandmarkMemory(block_size=size, **options)
    memory.append(draw(kv, before, dim), draw(kv, before, value_dim))
    return memory, draw(heads, 9, dim), draw(kv, 9, dim), draw(kv, 9, value_dim)


def calls() -> Iterator[None]:
    """Do one call after another."""
    for sizes, options in STREAMS:
        memory, *tokens = stream(sizes, options)
        for i in range(9):
            native._PRODUCTS = 1 if i % 2 else 1 << 22
            attend_with_memory(memory, *(t[:, :, i : i + 1] for t in tokens))
            yield
