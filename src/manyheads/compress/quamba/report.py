"""What quantising a block costs, site by site, with and without each of the two tricks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manyheads.attention.mamba import MambaMixer
from manyheads.compress.quamba.calibrate import BlockObservers
from manyheads.compress.quamba.quantisers import code_range
from manyheads.compress.quamba.simulate import SimulatedMamba
from manyheads.compress.quamba.sites import SITES, run_block

__all__ = ["block_report", "linear_bytes"]

_LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_TRICKS = {
    "naive": (False, False), "percentile": (True, False), "hadamard": (False, True),
    "both": (True, True),
}  # fmt: skip


def linear_bytes(block: MambaMixer) -> dict[str, int]:
    """Return the bytes of a block's matrices in half precision and in int8 with their scales."""
    numbers = sum(getattr(block, name).weight.numel() for name in _LINEARS)
    return {"float16": 2 * numbers, "int8": numbers + 4 * len(_LINEARS)}


@torch.no_grad()
def block_report(
    block: MambaMixer, observers: BlockObservers, inputs: list[Tensor], *, percentile: bool
) -> dict[str, Any]:
    """Return a block's figures over some of its inputs, plain JSON types.

    ``range``: largest magnitude a code stands for, by site. ``clipped``: share of values beyond it.
    ``error``: rms(difference) / rms of the block's output, with no trick, each alone, and both
    (those that the settings allow).
    """
    scales, hadamard = observers.scales(), observers.hadamard
    top = code_range(8)[1]
    figures: dict[str, Any] = {
        "range": {name: float(scales[name]) * top for name in SITES},
        "clipped": {},
        "error": {},
    }
    clipped = dict.fromkeys(SITES, 0.0)
    counts = dict.fromkeys(SITES, 0)
    outputs = []
    for x in inputs:
        trace = run_block(block, x, hadamard=hadamard)
        for name in SITES:
            # Half a step beyond the greatest code still rounds to it.
            beyond = trace.seen[name].abs() > scales[name] * (top + 0.5)
            clipped[name] += float(beyond.sum())
            counts[name] += beyond.numel()
        outputs.append(block(x).double())
    figures["clipped"] = {name: clipped[name] / max(counts[name], 1) for name in SITES}
    for name, (clips, turns) in _TRICKS.items():
        if (clips and not percentile) or (turns and not hadamard):
            continue
        own = observers.without(percentile=clips, hadamard=turns)
        quantised = SimulatedMamba.from_float(block, own, hadamard=turns).eval()
        apart = sum(
            float((quantised(x).double() - y).square().sum())
            for x, y in zip(inputs, outputs, strict=True)
        )
        whole = sum(float(y.square().sum()) for y in outputs)
        figures["error"][name] = (apart / whole) ** 0.5 if whole else 0.0
    return figures
