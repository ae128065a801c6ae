"""One more token of a whole language model: recurrent mechanisms against caches.

A :class:`MixerLM` of 12 layers, width 768, 12 heads and 256 tokens, float32, one mechanism in all
layers; softmax keeps its cache and attends with SDPA, lean keeps the same cache. What is timed is
``step``.

At batch 1 a token reads every weight once, whatever the mechanism (12 layers of 7 million), which
bounds the ratio at less than 3 with 8,192 tokens in the cache; rows of a batch share the weights
and not their caches, so that a batch shows more of the mechanism. Both are measured, beside the
ratio of what has to be read.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from manyheads.choose.machine import available_memory
from manyheads.choose.predict import can_hold
from manyheads.choose.timing import interleaved
from manyheads.layers.few_rows import quicken
from manyheads.layers.state import clone_state, state_bytes
from manyheads.models.language.causal import LMState
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig

__all__ = ["RECURRENT", "model_decode", "quickened_decode"]

RECURRENT = ("gla", "mamba", "aaren")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    layers: int = 12
    width: int = 768
    heads: int = 12
    contexts: tuple[int, int] = (1024, 8192)
    batches: tuple[int, ...] = (1, 4)


_QUICK = _Sizes(layers=2, width=32, heads=2, contexts=(16, 384), batches=(1, 2))


def model_decode(*, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Return a row for each mechanism and batch; what memory cannot hold is left out."""
    sizes = _QUICK if quick else _Sizes()
    torch.manual_seed(seed)
    found = []
    with torch.inference_mode():
        cached = {name: _model(name, sizes) for name in ("softmax", "lean")}
        for name in RECURRENT:
            model = _model(name, sizes)
            for batch in sizes.batches:
                # Two caches, each a quarter larger than what it holds, and a copy of a layer's.
                cache = 8 * sizes.layers * sizes.width * sum(sizes.contexts) * batch
                if can_hold(int(2.7 * cache), available_memory()):
                    found.append(_row(name, model, cached, batch, sizes, quick=quick))
    return found


def quickened_decode(*, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Time a token of transformers' Llama as it is, and with our linear layers, behind 64 tokens.

    Sizes as above. Nothing is returned where transformers is not installed.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return []
    sizes = _QUICK if quick else _Sizes()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=8 * sizes.width // 3,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    quickened = copy.deepcopy(model)
    quicken(quickened)
    found = []
    for batch in sizes.batches:
        calls = {n: _token(m, batch) for n, m in (("plain", model), ("quickened", quickened))}
        timings = interleaved(calls, repeats=3 if quick else 11, min_sample_seconds=1e-3)
        if timings.stopped == "interrupt":
            raise KeyboardInterrupt
        found.append({
            "model": "LlamaForCausalLM", "batch": batch, "layers": sizes.layers,
            "width": sizes.width,
            "seconds": {label: t.to_dict() for label, t in timings.items()},
            "times_faster": timings["plain"].median / timings["quickened"].median,
        })  # fmt: skip
    return found


def _token(model: Any, batch: int) -> Callable[[], None]:
    with torch.no_grad():
        cache = model(torch.zeros(batch, 64, dtype=torch.long), use_cache=True).past_key_values
    token = torch.zeros(batch, 1, dtype=torch.long)

    def call() -> None:
        with torch.no_grad():
            model(token, cache=cache, use_cache=True)
        cache.crop(-1)

    return call


def _row(
    name: str,
    model: MixerLM,
    cached: dict[str, MixerLM],
    batch: int,
    sizes: _Sizes,
    *,
    quick: bool,
) -> dict[str, Any]:
    few, many = sizes.contexts
    calls, held = {}, {}
    for label, one, context in (
        ("few", model, few),
        ("many", model, many),
        *((label, one, many) for label, one in cached.items()),
    ):
        state = _state(one, batch, context)
        held[label] = sum(state_bytes(s) for s in state.layers)
        calls[label] = _stepper(one, batch, state)
    timings = interleaved(calls, repeats=3 if quick else 11, min_sample_seconds=1e-3)
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    weights = sum(4 * p.numel() for p in model.parameters())
    cache = 8 * sizes.layers * sizes.width * many * batch
    return {
        "mechanism": name,
        "batch": batch,
        "layers": sizes.layers,
        "width": sizes.width,
        "contexts": list(sizes.contexts),
        "seconds": {label: t.to_dict() for label, t in timings.items()},
        "state_bytes": held,
        "weight_bytes": weights,
        "times_faster": timings["softmax"].median / timings["many"].median,
        "times_faster_than_lean": timings["lean"].median / timings["many"].median,
        "read_ratio": (weights + cache) / (weights + held["many"]),
        "context_ratio": timings["many"].median / timings["few"].median,
    }


def _model(name: str, sizes: _Sizes) -> MixerLM:
    config = MixerLMConfig(
        embed_dim=sizes.width,
        num_heads=sizes.heads,
        num_layers=sizes.layers,
        mixers=name,
    )
    return MixerLM(config).eval()


def _state(model: MixerLM, batch: int, context: int) -> LMState:
    """Return a state that has read ``context`` random tokens: one layer's, copied for all."""
    block = model.layers[0]
    state, width = block.mixer.init_state(batch), model.config.embed_dim  # type: ignore[union-attr, operator]
    # A cache doubles when it is full: five eighths first leave it a quarter of room at the end.
    for count in (5 * context // 8, context - 5 * context // 8):
        x = torch.randn(batch, count, width)
        state = block.mixer.update(x, state)[1]  # type: ignore[union-attr, operator]
    layers = (state, *(clone_state(state) for _ in range(len(model.layers) - 1)))
    return LMState(layers, torch.full((batch,), context))


def _stepper(model: MixerLM, batch: int, state: LMState) -> Callable[[], None]:
    token = torch.zeros(batch, dtype=torch.long)

    def call() -> None:
        nonlocal state
        with torch.inference_mode():
            state = model.step(token, state)[1]

    return call
