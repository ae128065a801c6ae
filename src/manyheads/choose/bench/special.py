"""What a table of lengths does not show: a recurrence by the token, streaming, a weighted bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.choose.bench.decode import model_decode, quickened_decode
from manyheads.choose.bench.grid import DIRECTIONS, bench_shape, is_linear
from manyheads.choose.bench.lean import lean_against_sdpa
from manyheads.choose.bench.mamba import measure_mamba
from manyheads.choose.bench.sequence import landmark_decode, landmark_training, long_sequences
from manyheads.choose.bench.sparse import sla_against_softmax
from manyheads.choose.cost import Subject, TensorPool, bind, draw_inputs
from manyheads.choose.growth import fit_exponent
from manyheads.choose.machine import available_memory, keep_freed_memory
from manyheads.choose.memory import peak_memory
from manyheads.choose.predict import can_hold
from manyheads.choose.results import Progress
from manyheads.choose.timing import Timings, forward, forward_backward, interleaved
from manyheads.layers.state import clone_state, state_bytes
from manyheads.registry import get_mechanism, list_mechanisms

__all__ = ["measure_special"]


_OF_SEVERAL = ("streaming", "long_sequences", "model_decode", "quickened_decode", "memory_kept")


def measure_special(*, quick: bool, seed: int, progress: Progress) -> dict[str, Any]:
    """Return the special measurements of the mechanisms that are there, by name."""
    parts: dict[str, Callable[..., Any]] = {
        "gla_against_reference": _gla_reference,
        "streaming": _streaming,
        "urpe_against_bias": _urpe_bias,
        "urpe_inference_memory": _urpe_memory,
        "sla_against_softmax": sla_against_softmax,
        "mamba_against_transformers": measure_mamba,
        "landmark_decode": landmark_decode,
        "landmark_training": landmark_training,
        "long_sequences": long_sequences,
        "model_decode": model_decode,
        "quickened_decode": quickened_decode,
        "lean_against_sdpa": lean_against_sdpa,
        # Last: it changes the process for good.
        "memory_kept": _memory_kept,
    }
    there = list_mechanisms()
    found = {}
    for index, (name, part) in enumerate(parts.items()):
        mechanism = name.partition("_")[0]
        if mechanism in there or name in _OF_SEVERAL:
            progress(index / len(parts), name.replace("_", " "))
            found[name] = part(quick=quick, seed=seed)
    return found


def _finished(timings: Timings) -> Timings:
    if timings.stopped == "interrupt":
        raise KeyboardInterrupt
    return timings


def _gla_reference(*, quick: bool, seed: int) -> dict[str, Any]:
    """Forward, and with backward, of gla against its definition token by token."""
    length = 256 if quick else 2048
    mechanism = get_mechanism("gla")
    shape = bench_shape(length, is_causal=True)
    inputs = draw_inputs(mechanism, shape, seed=seed)
    found: dict[str, Any] = {"length": length}
    for what, make in (("forward", forward), ("train", forward_backward)):
        calls = {
            "gla": make(mechanism.function, **inputs),
            "reference": make(mechanism.reference, **inputs),
        }
        timings = _finished(interleaved(calls, repeats=3, warmup=1))
        found[what] = {name: t.to_dict() for name, t in timings.items()}
        found[what]["times_faster"] = timings["reference"].median / timings["gla"].median
    return found


def _streaming(*, quick: bool, seed: int) -> list[dict[str, Any]]:
    """Time of a token and bytes of the state after 10 and after 10,000 tokens."""
    many = 1000 if quick else 10_000
    calls: dict[str, Callable[[], Any]] = {}
    sizes: dict[str, int] = {}
    names = [n for n in list_mechanisms() if get_mechanism(n).step is not None]
    for name in names:
        mechanism = get_mechanism(name)
        for count in (10, many):
            shape = bench_shape(count + 2, is_causal=True)
            inputs = draw_inputs(mechanism, shape, seed=seed)
            moving = {k for k, t in inputs.items() if t.ndim == 4 and t.shape[2] == count + 2}
            with torch.no_grad():
                block = {k: t[:, :, :count] if k in moving else t for k, t in inputs.items()}
                assert mechanism.update is not None
                _, state = mechanism.update(None, **block)
                token = {k: t[:, :, -1].clone() if k in moving else t for k, t in inputs.items()}
                key = f"{name}/{count}"
                sizes[key] = state_bytes(clone_state(state))
                assert mechanism.step is not None
                # The first step may enlarge a cache; the timed ones find room in it.
                _, state = mechanism.step(state, **token)
            calls[key] = forward(mechanism.step, state, **token)
    timings = _finished(interleaved(calls, repeats=3 if quick else 21, min_sample_seconds=5e-3))
    return [
        {
            "mechanism": name,
            "constant_state": get_mechanism(name).constant_state,
            "tokens": [10, many],
            "state_bytes": [sizes[f"{name}/{n}"] for n in (10, many)],
            "seconds": [timings[f"{name}/{n}"].to_dict() for n in (10, many)],
            "time_ratio": timings[f"{name}/{many}"].median / timings[f"{name}/10"].median,
            "within_spread": timings[f"{name}/{many}"].overlaps(timings[f"{name}/10"]),
        }
        for name in names
    ]


def _urpe_bias(*, quick: bool, seed: int) -> list[dict[str, Any]]:
    """URPE against SDPA with a dense bias of (1, H, N, N), with and without its gradient."""
    mechanism = get_mechanism("urpe")
    found = []
    for length in (128, 256) if quick else (1024, 2048, 4096):
        shape = bench_shape(length, is_causal=False)
        if not can_hold(6 * 4 * shape.heads * length * length, available_memory()):
            continue
        subject = Subject("urpe", shape, seed=seed)
        q, k, v = (subject.inputs[n] for n in ("query", "key", "value"))
        generator = torch.Generator().manual_seed(seed)
        bias = torch.randn(1, shape.heads, length, length, generator=generator)

        def fixed_bias(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor = bias) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        calls = {
            "urpe forward": subject.call("forward"),
            "sdpa forward": forward(fixed_bias, q, k, v),
            "urpe": subject.call("train"),
            "sdpa": forward_backward(fixed_bias, q, k, v),
            "sdpa, bias with gradient": forward_backward(
                F.scaled_dot_product_attention, q, k, v, attn_mask=bias
            ),
        }
        timings = _finished(interleaved(calls, repeats=3 if quick else 5))
        own = timings["urpe"].median
        found.append(
            {
                "length": length,
                "seconds": {name: t.to_dict() for name, t in timings.items()},
                "forward_ratio": timings["urpe forward"].median / timings["sdpa forward"].median,
                "ratio": own / timings["sdpa"].median,
                "ratio_bias_gradient": own / timings["sdpa, bias with gradient"].median,
            }
        )
        del calls, bias, subject
    assert mechanism.bidirectional
    return found


def _urpe_memory(*, quick: bool, seed: int) -> dict[str, Any]:
    """Peak memory of URPE without gradients, against one (B, H, N, N) tensor."""
    length = 512 if quick else 8192
    mechanism = get_mechanism("urpe")
    found: dict[str, Any] = {"length": length}
    for direction in ("bidirectional", "causal"):
        is_causal = direction == "causal"
        if not (mechanism.causal if is_causal else mechanism.bidirectional):
            continue
        shape = bench_shape(length, is_causal=is_causal)
        inputs = draw_inputs(mechanism, shape, seed=seed)
        memory = peak_memory(forward(bind(mechanism, is_causal), **inputs))
        found[direction] = {
            "peak_bytes": memory.peak_bytes,
            "largest_tensor_bytes": memory.largest_tensor_bytes,
            "square_bytes": 4 * shape.heads * length * length,
        }
    return found


def _memory_kept(*, quick: bool, seed: int) -> dict[str, Any]:
    """Growth with the length once more, with freed memory kept by the process."""
    kept = keep_freed_memory()
    lengths = (256, 512) if quick else (2048, 4096, 8192, 16384, 32768)
    times: dict[tuple[str, str], dict[int, float]] = {}
    for length in lengths if kept else ():
        calls: dict[str, Callable[[], Any]] = {}
        pool = TensorPool()
        for name in filter(is_linear, list_mechanisms()):
            mechanism = get_mechanism(name)
            for direction in DIRECTIONS:
                is_causal = direction == "causal"
                if mechanism.causal if is_causal else mechanism.bidirectional:
                    shape = bench_shape(length, is_causal=is_causal)
                    subject = Subject(name, shape, seed=seed, pool=pool)
                    calls[f"{name}/{direction}"] = subject.call("train")
        timings = _finished(interleaved(calls, repeats=3 if quick else 5, min_sample_seconds=1e-2))
        for key, timing in timings.items():
            name, direction = key.split("/")
            times.setdefault((name, direction), {})[length] = timing.median
    return {
        "kept": kept,
        "lengths": list(lengths),
        "rows": [
            {
                "mechanism": name,
                "direction": direction,
                "seconds": list(found.values()),
                "exponent": fit_exponent(list(found), list(found.values()))[0],
            }
            for (name, direction), found in times.items()
        ],
    }
