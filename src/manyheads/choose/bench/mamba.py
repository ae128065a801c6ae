"""Mamba's scan and block against the loop that transformers runs on a CPU, and one token of it.

E 1,536 channels of 16 states, as in the published 130M model; B = 1.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.mamba import MambaConfig, MambaMixer, selective_scan
from manyheads.choose.bench.lean import memory_reader
from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import Timings, forward, forward_backward, interleaved

__all__ = ["measure_mamba"]

_WIDTH, _STATES = 768, 16
_LENGTH = 2048
# The backward of transformers' loop makes a gradient of the size of all states for each token: it
# grows with the square of the length and takes many minutes at 2,048.
_TRAIN_LENGTH = 256


def measure_mamba(*, quick: bool, seed: int) -> dict[str, Any]:
    """Time forward at 2,048 tokens, forward and backward at 256, peak memory of both, and a token.

    Returns:
        For "scan" and "mixer": "forward" and "train", each with seconds and peak bytes of both
        and their ratios ("times_faster", "times_less_memory"). "step": seconds of a token of the
        block, of a loop that reads as many bytes as its weights and state have ("over_read"), and
        of its matrix products by torch alone ("over_products"). Without transformers the
        comparisons are missing and "missing" says so.
    """
    lengths = {"forward": 256 if quick else _LENGTH, "train": 64 if quick else _TRAIN_LENGTH}
    found: dict[str, Any] = {"lengths": lengths}
    torch.manual_seed(seed)
    mixer = MambaMixer(MambaConfig(embed_dim=_WIDTH))
    found["step"] = _step(mixer, quick=quick)
    try:
        theirs = importlib.import_module("transformers.models.mamba.modeling_mamba")
        configs = importlib.import_module("transformers.models.mamba.configuration_mamba")
    except ImportError as error:
        return found | {"missing": str(error)}
    with _silent():
        config = configs.MambaConfig(hidden_size=_WIDTH, state_size=_STATES, use_mambapy=False)
        other = theirs.MambaMixer(config, 0)
        pairs: dict[str, Callable[[int], tuple[Any, Any]]] = {
            "mixer": lambda length: _mixers(mixer, other, length),
        }
        if hasattr(theirs, "mamba_selective_scan"):
            pairs["scan"] = lambda length: _scans(theirs.mamba_selective_scan, length)
        for name, pair in pairs.items():
            found[name] = {
                what: _compare(*pair(length), what, quick=quick) for what, length in lengths.items()
            }
    return found


def _compare(ours: Any, theirs: Any, what: str, *, quick: bool) -> dict[str, Any]:
    make = forward if what == "forward" else forward_backward
    calls = {
        "ours": make(ours[0], *ours[1], **ours[2]),
        "theirs": make(theirs[0], *theirs[1], **theirs[2]),
    }
    timings = _finished(interleaved(calls, repeats=3 if quick else 5, warmup=1))
    peaks = {name: peak_memory(call).peak_bytes for name, call in calls.items()}
    return {
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "peak_bytes": peaks,
        "times_faster": timings["theirs"].median / timings["ours"].median,
        "times_less_memory": peaks["theirs"] / peaks["ours"],
    }


def _mixers(ours: nn.Module, theirs: nn.Module, length: int) -> tuple[Any, Any]:
    x = torch.randn(1, length, _WIDTH)
    return (ours, (x,), {}), (theirs, (x,), {})


def _scans(theirs: Callable[..., Tensor], length: int) -> tuple[Any, Any]:
    channels = 2 * _WIDTH
    u, delta, z = torch.randn(3, 1, length, channels).mT  # as the projections leave them
    b, c = torch.randn(2, 1, length, _STATES).mT
    a = -torch.rand(channels, _STATES) * _STATES
    skip, bias = torch.randn(channels), torch.randn(channels) - 3
    args = (u, delta, a, b, c)
    return (
        (selective_scan, args, {"d": skip, "z": z, "delta_bias": bias, "delta_softplus": True}),
        (theirs, args, {"D": skip, "z": z, "delta_bias": bias, "delta_softplus": True}),
    )


def _step(mixer: MambaMixer, *, quick: bool) -> dict[str, Any]:
    state, x = mixer.init_state(1), torch.randn(1, _WIDTH)
    weights = [p.detach() for p in mixer.parameters() if p.ndim == 2 and p.shape[1] != _STATES]
    inputs = [torch.randn(1, w.shape[1]) for w in weights]

    def products() -> None:
        for weight, vector in zip(weights, inputs, strict=True):
            F.linear(vector, weight)

    held = torch.zeros(sum(t.numel() for t in (*mixer.parameters(), *state)))
    calls = {
        "step": forward(mixer.step, x, state),
        "products": forward(products),
        "read": memory_reader(held, torch.get_num_threads()),
    }
    timings = _finished(interleaved(calls, repeats=3 if quick else 21, min_sample_seconds=5e-3))
    return {
        "seconds": {name: t.to_dict() for name, t in timings.items()},
        "weight_bytes": 4 * sum(w.numel() for w in weights),
        "read_bytes": 4 * held.numel(),
        "over_read": timings["step"].median / timings["read"].median,
        "over_products": timings["step"].median / timings["products"].median,
    }


def _finished(timings: Timings) -> Timings:
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    return timings


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from saying at each layer which packages for CUDA are not there."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
