"""What attention over a few blocks gains at a length where all blocks are many."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import forward, forward_backward, interleaved
from manyheads.registry import get_mechanism

__all__ = ["sla_against_softmax"]

_LENGTH, _DIM = 32_768, 128  # about a video of Wan2.1, one of its heads


def sla_against_softmax(*, quick: bool, seed: int) -> dict[str, Any]:
    """Time SLA, 5 % of the blocks, against SDPA: one head of 128, no causal mask.

    Backward is what forward with backward takes beyond forward. Memory is the largest tensor of
    both over one N x N tensor.
    """
    length = 512 if quick else _LENGTH
    sla = get_mechanism("sla").function
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, length, _DIM, generator=generator) for _ in range(3))
    found: dict[str, Any] = {"length": length, "head_dim": _DIM, "topk": 0.05}
    medians: dict[str, dict[str, float]] = {}
    for what, make in (("forward", forward), ("train", forward_backward)):
        calls = {
            "sla": make(sla, q, k, v),
            "sdpa": make(F.scaled_dot_product_attention, q, k, v),
        }
        timings = interleaved(calls, repeats=3, warmup=1)
        if timings.stopped == "interrupt":
            raise KeyboardInterrupt
        found[what] = {name: t.to_dict() for name, t in timings.items()}
        medians[what] = {name: t.median for name, t in timings.items()}
        found[what]["times_faster"] = medians[what]["sdpa"] / medians[what]["sla"]
    backward = {n: medians["train"][n] - medians["forward"][n] for n in ("sla", "sdpa")}
    found["backward"] = {"seconds": backward, "times_faster": backward["sdpa"] / backward["sla"]}
    memory = peak_memory(forward_backward(sla, q, k, v))
    found["largest_tensor_bytes"] = memory.largest_tensor_bytes
    found["peak_bytes"] = memory.peak_bytes
    found["square_bytes"] = 4 * length * length
    return found
