"""Calls of the scan's kernels over shapes that are apt to go wrong; run under sanitizers too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manyheads.attention import MambaConfig, MambaMixer, MambaState, mamba_step, mamba_update

# batch, heads, key heads, length, states, channels
SHAPES = (
    (1, 1, 1, 1, 1, 1),
    (2, 3, 3, 33, 16, 17),
    (1, 4, 2, 63, 5, 20),
    (3, 1, 1, 70, 16, 100),
    (1, 1, 1, 40, 8, 33),
    (1, 2, 2, 5, 40, 16),
    (0, 1, 1, 7, 16, 16),
    (1, 1, 1, 7, 16, 0),
    (1, 1, 1, 7, 0, 20),
)


def inputs(shape: tuple[int, ...], *, seed: int = 0, layout: str = "heads") -> dict[str, Tensor]:
    """Random tensors in float64, and in one of the layouts that callers have."""
    batch, heads, kv, length, states, channels = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    def tokens(count: int, last: int) -> Tensor:
        if layout == "heads":
            return draw(batch, count, length, last)
        if layout == "tokens":  # a slice of a wider projection
            return draw(batch, length, count, last + 3)[..., 2 : last + 2].transpose(1, 2)
        return draw(batch, count, last, length).mT  # channels first

    return {
        "query": tokens(heads, states),
        "key": tokens(kv, states),
        "value": tokens(kv, channels),
        "delta": tokens(kv, channels) - 2,
        "a": -draw(kv, channels, states).exp(),
        "skip": draw(kv, channels),
        "gate": tokens(heads, channels),
        "delta_bias": draw(kv, channels),
    }


def tokens_of_blocks() -> Iterator[None]:
    """Pass a token through blocks large enough for the kernel, of even and odd sizes."""
    for batch, width, options in (
        (1, 192, {}),
        (3, 213, {"num_heads": 3, "state_dim": 21, "proj_bias": True, "expand": 1}),
        (8, 190, {"conv_size": 1, "conv_bias": False, "dt_rank": 1, "state_dim": 3}),
    ):
        layer = MambaMixer(MambaConfig(embed_dim=width, **options))
        with torch.no_grad():
            state = layer.init_state(batch)
            for _ in range(3):
                _, state = layer.step(torch.randn(batch, width), state)
        yield


def calls() -> Iterator[None]:
    """Do one call after another."""
    yield from tokens_of_blocks()
    for index, shape in enumerate(SHAPES):
        for layout in ("heads", "tokens", "channels"):
            given = {k: t.float() for k, t in inputs(shape, layout=layout).items()}
            mask = None if index % 2 else torch.rand(shape[0], shape[3]) > 0.3
            if index % 3 == 2:
                given |= {"skip": None, "gate": None, "delta_bias": None}
            leaves = {k: None if t is None else t.requires_grad_() for k, t in given.items()}
            out, state = mamba_update(None, **leaves, mask=mask, implementation="native")
            (out.sum() + state.memory.sum()).backward()
            with torch.no_grad():
                token = {
                    k: None if t is None else t[:, :, 0] if t.ndim == 4 else t
                    for k, t in given.items()
                }
                mamba_step(MambaState(state.memory), **token)
                mamba_update(state, **given, implementation="native", chunk_size=3)
            yield
