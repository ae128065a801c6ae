"""Latencies of EfficientFormer's parts on this machine, for slimming to a target."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from manyheads.attention.grid.distance import DistanceAttention
from manyheads.choose.timing import forward, interleaved
from manyheads.layers.conv_norm import ConvNorm
from manyheads.models.vision.efficientformer import EfficientFormerConfig, MapBlock, TokenBlock
from manyheads.models.vision.efficientformer.slim import STEP, LatencyTable

__all__ = ["measure_latencies"]


def measure_latencies(
    config: EfficientFormerConfig,
    *,
    batch: int = 1,
    repeats: int = 5,
    least_width: int = STEP,
    progress: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure every part of a supernet at every width that slimming can give it.

    Parts are folded as for inference and run alone; the last stage's blocks on tokens include no
    reshaping. What leads into a stage is measured with the widest stage before it: an upper bound.

    Args:
        config: of the supernet; its ``image_size`` sets the maps.
        batch: images at once.
        repeats: rounds, at least 3.
        least_width: channels from which on a table is wanted, a multiple of 16.
        progress: called as ``progress(done, total)`` in parts.

    Raises:
        ValueError: ``least_width`` is not a multiple of 16 or wider than a stage.
    """
    if least_width % STEP or least_width < STEP or least_width > min(config.embed_dims):
        raise ValueError(
            f"least_width {least_width} must be a multiple of {STEP}, at most "
            f"{min(config.embed_dims)}, the narrowest stage"
        )
    parts = [
        (stage, width)
        for stage, dim in enumerate(config.embed_dims)
        for width in range(least_width, dim + 1, STEP)
    ]
    found: dict[str, float] = {}
    for index, (stage, width) in enumerate(parts):
        calls = _calls(config, stage, width, batch)
        for name, timing in interleaved(calls, repeats=repeats).items():
            found[f"{name}/{stage}/{width}"] = timing.median * 1e3
        if progress is not None:
            progress(index + 1, len(parts))
    return LatencyTable(milliseconds=found)


def _calls(
    c: EfficientFormerConfig, stage: int, width: int, batch: int
) -> dict[str, Callable[[], object]]:
    last = len(c.depths) - 1
    scale = 2 ** (last - stage)
    rows, columns = (side * scale for side in c.grid)

    def on_map(module: nn.Module, dim: int, size: tuple[int, int]) -> Callable[[], object]:
        for part in list(module.modules()):
            fold = getattr(part, "fold", None)
            if fold is not None:
                fold()
        module = module.eval().to(memory_format=torch.channels_last)
        x = torch.randn(batch, dim, *size).to(memory_format=torch.channels_last)
        return forward(module, x)

    calls = {}
    if stage:
        embed = ConvNorm(c.embed_dims[stage - 1], width, 3, stride=2)
        calls["embed"] = on_map(embed, c.embed_dims[stage - 1], (2 * rows, 2 * columns))
    else:
        stem = nn.Sequential(
            ConvNorm(c.in_channels, width // 2, 3, stride=2), nn.ReLU(),
            ConvNorm(width // 2, width, 3, stride=2), nn.ReLU(),
        )  # fmt: skip
        calls["stem"] = on_map(stem, c.in_channels, (4 * rows, 4 * columns))
    calls["map"] = on_map(MapBlock(width, pool_size=c.pool_size, mlp_ratio=c.mlp_ratio), width,
                          (rows, columns))  # fmt: skip
    if stage == last:
        mixer = DistanceAttention(width, grid=c.grid, num_heads=c.num_heads, key_dim=c.key_dim,
                                  value_ratio=c.value_ratio)  # fmt: skip
        block = TokenBlock(width, mixer, mlp_ratio=c.mlp_ratio).eval()
        calls["token"] = forward(block, torch.randn(batch, rows * columns, width), c.grid)
    return calls
