"""What a model costs: parameters, bytes, cache, multiply-adds and milliseconds, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.choose.timing import interleaved
from manyheads.compress.anatomy import anatomy
from manyheads.compress.files import weight_bytes
from manyheads.shrink.data import Feed
from manyheads.shrink.quality import Quality

__all__ = ["Measured", "calls_of", "kv_bytes_per_token", "measure_all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Figures of one model.

    Attributes:
        name: "original" or the steps that made it.
        parameters: tied ones once; weights held as int8 count as the float ones they stand for.
        weight_bytes: of parameters and buffers.
        kv_bytes: of the cache, for each token and sequence; 0 where there is none.
        macs: multiply-adds of one batch; None where they cannot be counted.
        forward_ms: median of one batch.
        forward_spread: distance of the quartiles as a share of the median.
        token_ms: median for one further token of one sequence; None where nothing is decoded.
        quality: on the data asked for.
    """

    name: str
    parameters: int
    weight_bytes: int
    kv_bytes: int
    macs: int | None
    forward_ms: float
    forward_spread: float
    token_ms: float | None
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kv_bytes_per_token(model: nn.Module) -> int:
    """Return the bytes that a decoder's self-attention caches hold for each token of a sequence.

    Mechanisms with a state of constant size hold none.
    """
    try:
        parts = anatomy(model)
    except ValueError:
        return 0
    total = 0
    for block, sublayer in parts.sublayers("attention"):
        a = sublayer.attention
        if block.role != "decoder" or a is None or not a.head_dim:
            continue
        core: Any = model.get_submodule(a.core)
        if block.family == "manyheads" and getattr(core, "constant_state", _constant(core)):
            continue
        size = next((p.element_size() for p in model.parameters()), 4)
        total += 2 * a.num_kv_heads * a.head_dim * size
    return total


def _constant(mixer: nn.Module) -> bool:
    from manyheads.registry import get_mechanism, list_mechanisms

    for name in list_mechanisms():
        mechanism = get_mechanism(name)
        if type(mixer) is mechanism.module:
            return mechanism.constant_state
    return False


def calls_of(
    model: nn.Module, feed: Feed, batch: dict[str, Tensor]
) -> dict[str, Callable[[], Any]]:
    """Return what is timed: a batch forward, and for causal models one further token."""

    def forward() -> Any:
        with torch.no_grad():
            return model(**batch)

    calls: dict[str, Callable[[], Any]] = {"forward": forward}
    if feed.kind == "causal":
        calls["token"] = _token_call(model, batch)
    return calls


def _token_call(model: Any, batch: dict[str, Tensor]) -> Callable[[], Any]:
    if "tokens" in batch:
        prompt = batch["tokens"][:1]
        with torch.no_grad():
            _, state = model.update(prompt, model.init_state(1))

        def step() -> Any:
            with torch.no_grad():
                return model.step(prompt[:, -1], state)

        return step
    prompt = batch["input_ids"][:1]
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
    length = prompt.shape[1]

    def token() -> Any:
        with torch.no_grad():
            out = model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
        if getattr(cache, "is_croppable", False):
            cache.crop(length - cache.get_seq_length())  # a negative count takes so many off
        return out

    return token


def measure_all(
    models: Mapping[str, nn.Module],
    feed: Feed,
    batch: dict[str, Tensor],
    qualities: Mapping[str, Quality],
    *,
    repeats: int,
    progress: Callable[[float, str], None] | None = None,
) -> list[Measured]:
    """Measure models against each other: their calls take turns in one run."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        for what, call in calls_of(model, feed, batch).items():
            calls[f"{name}\0{what}"] = call

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(done / total, "timing")

    timings = interleaved(calls, repeats=repeats, progress=tell)
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    out = []
    for name, model in models.items():
        forward = timings[f"{name}\0forward"]
        token = timings.get(f"{name}\0token")
        out.append(
            Measured(
                name=name,
                parameters=_parameters(model),
                weight_bytes=weight_bytes(model),
                kv_bytes=kv_bytes_per_token(model) if feed.kind in ("causal", "speech") else 0,
                macs=_macs(model, batch),
                forward_ms=1e3 * forward.median,
                forward_spread=forward.spread,
                token_ms=None if token is None else 1e3 * token.median,
                quality=qualities[name],
            )
        )
    return out


def _parameters(model: nn.Module) -> int:
    kept = {id(p): p.numel() for p in model.parameters()}
    kept |= {id(b): b.numel() for b in model.buffers() if b.dtype in (torch.int8, torch.uint8)}
    return sum(kept.values())


def _macs(model: nn.Module, batch: dict[str, Tensor]) -> int | None:
    from manyheads.choose.flops import count_flops

    def run() -> Any:
        with torch.no_grad():
            return model(**batch)

    try:
        return count_flops(run, strict=False).total // 2
    except (RuntimeError, ValueError, NotImplementedError):
        return None
