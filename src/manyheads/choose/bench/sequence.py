"""Long sequences: routing and orchid against SDPA, how they grow, and landmark with its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.choose.growth import fit_exponent
from manyheads.choose.timing import Timings, forward, forward_backward, interleaved
from manyheads.registry import get_mechanism, list_mechanisms

__all__ = ["landmark_decode", "landmark_training", "long_sequences"]

_HEADS, _DIM = 4, 64


def long_sequences(*, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Forward and backward of 4 heads of 64, causal where there is a causal form.

    Against SDPA at one length, and alone at several. Routing has as many clusters as tokens in
    each, sqrt(N), queries that are keys, and its two selections.
    """
    length = 256 if quick else 16384
    lengths = (128, 256) if quick else (4096, 8192, 16384, 32768)
    forms = {
        "routing strict": lambda n: _routing(n, seed, "strict"),
        "routing top": lambda n: _routing(n, seed, "top"),
        "orchid": lambda n: _orchid(n, seed),
    }
    there = list_mechanisms()
    forms = {name: make for name, make in forms.items() if name.split()[0] in there}
    q, k, v = _draw(3, length, seed)
    attend = F.scaled_dot_product_attention
    calls = {name: make(length) for name, make in forms.items()}
    calls["sdpa causal"] = forward_backward(attend, q, k, v, is_causal=True)
    calls["sdpa"] = forward_backward(attend, q, k, v)
    against = _finished(interleaved(calls, repeats=3, min_sample_seconds=_sample(quick)))
    alone = {(name, n): make(n) for name, make in forms.items() for n in lengths}
    grown = _finished(
        interleaved(
            {f"{name}/{n}": call for (name, n), call in alone.items()},
            repeats=3 if quick else 7,
            min_sample_seconds=_sample(quick),
        )
    )
    found = []
    for name in forms:
        base = "sdpa" if name == "orchid" else "sdpa causal"
        seconds = [grown[f"{name}/{n}"].median for n in lengths]
        found.append(
            {
                "form": name,
                "length": length,
                "seconds": {n: against[n].to_dict() for n in (name, base)},
                "times_faster": against[base].median / against[name].median,
                "lengths": list(lengths),
                "grown_seconds": seconds,
                "exponent": fit_exponent(lengths, seconds)[0],
            }
        )
    return found


def landmark_decode(*, quick: bool, seed: int) -> dict[str, Any]:
    """One token of 8 heads over 2 key heads of 64 behind a long stream.

    With a memory that fetches 4 blocks of 50 tokens a head, rotary positions included, against
    SDPA over the whole cache.
    """
    from manyheads.attention.landmark import LandmarkMemory, attend_with_memory

    cached = 1024 if quick else 65536
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, 2, cached, _DIM, generator=generator)
    q = torch.randn(1, 8, 1, _DIM, generator=generator)
    k, v = torch.randn(2, 1, 2, 1, _DIM, generator=generator)
    memory = LandmarkMemory(block_size=50, top_k=4)
    memory.append(keys, values)

    def remember() -> Tensor:
        # The token is taken back, so that every call finds the same stream.
        seen, tail = memory.seen, memory.tail
        out = attend_with_memory(memory, q, k, v)
        memory.seen, memory.tail = seen, tail
        return out

    calls: dict[str, Callable[[], Any]] = {
        "landmark": remember,
        "sdpa": forward(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True),
    }
    repeats = 3 if quick else 21
    timings = _finished(interleaved(calls, repeats=repeats, min_sample_seconds=_sample(quick)))
    return {
        "cached": cached,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "times_faster": timings["sdpa"].median / timings["landmark"].median,
    }


def landmark_training(*, quick: bool, seed: int) -> dict[str, Any]:
    """The dense form that is trained, forward and backward, over causal SDPA: 8 heads of 64."""
    length = 256 if quick else 4096
    q, k, v = _draw(3, length, seed, heads=8)
    calls = {
        "landmark": forward_backward(get_mechanism("landmark").function, q, k, v, block_size=50),
        "sdpa": forward_backward(F.scaled_dot_product_attention, q, k, v, is_causal=True),
    }
    repeats = 3 if quick else 7
    timings = _finished(interleaved(calls, repeats=repeats, min_sample_seconds=_sample(quick)))
    return {
        "length": length,
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "ratio": timings["landmark"].median / timings["sdpa"].median,
    }


def _draw(count: int, length: int, seed: int, heads: int = _HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, heads, length, _DIM, generator=generator)


def _routing(length: int, seed: int, selection: str) -> Callable[[], Any]:
    size = round(math.sqrt(length))
    q, v = _draw(2, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    means = torch.randn(_HEADS, size, _DIM, generator=generator)
    function = get_mechanism("routing").function

    def shared(q: Tensor, v: Tensor) -> Tensor:
        return function(q, q, v, means, window=size, is_causal=True, selection=selection)

    return forward_backward(shared, q, v)


def _orchid(length: int, seed: int) -> Callable[[], Any]:
    return forward_backward(get_mechanism("orchid").function, *_draw(4, length, seed))


def _sample(quick: bool) -> float:
    return 1e-3 if quick else 1e-2


def _finished(timings: Timings) -> Timings:
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    return timings
