"""Flowformer: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.attention import flow, flow_flows, flow_step, flow_update, softmax
from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import forward, forward_backward, interleaved
from manyheads.data.synthetic import CopyConfig, TaskBatches, get_task
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.papers.base import Check, Claim, Measurement, Paper
from manyheads.papers.small import fit, held_out_accuracy, token_loss

__all__ = ["PAPER", "conservation_error", "measure", "prefix_error"]

_HEADS, _DIM = 8, 64
_SHORT, _LONG = 1024, 4096
_COPY = CopyConfig(vocab_size=16, symbols=8)
_STEPS, _BATCH, _RATE = 400, 64, 1e-2

Progress = Callable[[str], None]


def _inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, _HEADS, length, _DIM, generator=generator)
    return query, key, value


def measure(progress: Progress) -> Measurement:
    """Measure conservation, growth in time, memory of the causal form, its prefixes, copying."""
    progress("conservation")
    conserved = max(conservation_error(is_causal=is_causal) for is_causal in (False, True))
    progress("prefill and steps")
    prefix = prefix_error()
    growth, causal_growth, times = _growth(progress)
    progress("memory of the causal form")
    query, key, value = (t.requires_grad_() for t in _inputs(_SHORT))
    peak = peak_memory(
        lambda: torch.autograd.grad(
            flow(query, key, value, is_causal=True).sum(), (query, key, value)
        )
    )
    outer = 4 * _HEADS * _SHORT * _DIM * _DIM
    accuracy = {name: _copying(name, progress) for name in ("flow", "softmax")}
    return Measurement(
        checks=(
            Check(
                what="largest deviation from 1 of what a source gives or a sink takes",
                claimed="flows are conserved",
                measured=conserved,
                direction=conserved < 1e-3,
                size=conserved <= 1e-5,
                bound="at most 1e-5, with eps = 0",
            ),
            Check(
                what=f"forward time at {_LONG:,} tokens over {_SHORT:,}, bidirectional",
                claimed="linear",
                measured=growth["flow"],
                unit="x",
                direction=growth["flow"] < growth["softmax"],
                size=growth["flow"] < 6,
                bound=f"below 6; softmax {growth['softmax']:.1f}",
            ),
            Check(
                what="the same for softmax",
                claimed="quadratic",
                measured=growth["softmax"],
                unit="x",
                direction=growth["softmax"] > growth["flow"],
                size=growth["softmax"] > 12,
                bound="above 12",
            ),
            Check(
                what="forward and backward, causal: the same growth",
                claimed="linear",
                measured=causal_growth["flow"],
                unit="x",
                direction=causal_growth["flow"] < causal_growth["softmax"],
                size=causal_growth["flow"] < 6,
                bound=f"below 6; softmax {causal_growth['softmax']:.1f}",
            ),
            Check(
                what="peak memory of the causal form with its gradients over that of N · D · V",
                claimed="linear memory (the official causal code makes N · D · V numbers a head)",
                measured=peak.peak_bytes / outer,
                unit="x",
                direction=peak.peak_bytes < outer,
                size=peak.peak_bytes < 0.3 * outer,
                bound=f"below 0.3; largest tensor {peak.largest_tensor_bytes / outer:.3f}",
            ),
            Check(
                what="prefill and steps against the whole, largest difference",
                claimed="the causal form is a recurrence",
                measured=prefix,
                direction=prefix < 1e-3,
                size=prefix <= 1e-5,
                bound="at most 1e-5",
            ),
            Check(
                what="accuracy of copying with two layers, minus softmax's",
                claimed="a drop-in replacement",
                measured=accuracy["flow"] - accuracy["softmax"],
                direction=accuracy["flow"] > 0.5,
                size=accuracy["flow"] - accuracy["softmax"] > -0.05,
                bound=f"above -0.05; {accuracy['flow']:.3f} to {accuracy['softmax']:.3f}",
            ),
        ),
        figures={
            "seconds": times,
            "peak_bytes": peak.peak_bytes,
            "largest_tensor_bytes": peak.largest_tensor_bytes,
            "copying": accuracy,
            "copying_task": _COPY.to_dict() | {"steps": _STEPS, "batch": _BATCH, "rate": _RATE},
        },
        notes=(
            "accuracies on Long Range Arena, ImageNet, WikiText-103, UEA and D4RL were not "
            "re-measured",
        ),
    )


def conservation_error(*, is_causal: bool) -> float:
    """Return the largest deviation from 1 of what a source gives and a sink takes, eps = 0."""
    query, key, _ = _inputs(300)
    flows = flow_flows(query, key, is_causal=is_causal, eps=0.0)
    capacity = query.sigmoid() @ key.sigmoid().mT
    taken, given = (capacity.tril(), capacity.triu()) if is_causal else (capacity, capacity)
    sinks = (taken / flows.incoming[..., None]).sum(-1)
    sources = (given / flows.outgoing[..., None, :]).sum(-2)
    return max(float((t - 1).abs().max()) for t in (sinks, sources))


def prefix_error(*, length: int = 600, prefill: int = 500) -> float:
    """Return the largest difference of prefill and steps from the causal form on the whole."""
    query, key, value = _inputs(length)
    whole = flow(query, key, value, is_causal=True)
    out, state = flow_update(None, *(t[:, :, :prefill] for t in (query, key, value)))
    parts = [out]
    for t in range(prefill, length):
        one, state = flow_step(state, query[:, :, t], key[:, :, t], value[:, :, t])
        parts.append(one[:, :, None])
    return float((torch.cat(parts, 2) - whole).abs().max())


def _growth(
    progress: Progress,
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Return time at the longer length over the shorter: bidirectional forward, causal training."""
    times: dict[str, dict[str, float]] = {}
    growth = []
    for label, wrap, is_causal in (
        ("bidirectional forward", forward, False),
        ("causal forward and backward", forward_backward, True),
    ):
        progress(f"{label} at {_SHORT:,} and {_LONG:,} tokens")
        calls = {
            f"{fn.__name__} {n}": wrap(fn, *_inputs(n), is_causal=is_causal)
            for fn in (flow, softmax)
            for n in (_SHORT, _LONG)
        }
        timings = interleaved(calls, repeats=7, budget_seconds=20)
        times[label] = {name: t.median for name, t in timings.items()}
        growth.append(
            {
                name: times[label][f"{name} {_LONG}"] / times[label][f"{name} {_SHORT}"]
                for name in ("flow", "softmax")
            }
        )
    return growth[0], growth[1], times


def _copying(name: str, progress: Progress) -> float:
    """Train two small causal layers to copy; return the accuracy on held-out sequences."""
    task = get_task("copy")
    torch.manual_seed(0)
    model = MixerLM(
        MixerLMConfig(
            vocab_size=_COPY.vocab_size,
            embed_dim=64,
            num_heads=2,
            mixers=f"{name}*2",
            add_positions=True,
            mlp_ratio=2,
        )
    )
    fit(
        model,
        TaskBatches(task, _COPY, batch_size=_BATCH),
        token_loss,
        torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1),
        steps=_STEPS,
        progress=lambda text: progress(f"copying, {name}: {text}"),
    )
    return held_out_accuracy(model, task, _COPY, samples=256)


PAPER = Paper(
    slug="flowformer",
    title="Flowformer: Linearizing Transformers with Conservation Flows",
    arxiv="2202.06258",
    summary=(
        "Linear attention derived from a flow network: values are sources, results are sinks, and "
        "conservation of what flows in and out makes sources compete without a softmax over pairs. "
        "It needs no locality, no position weights and no random features, and has bidirectional, "
        "cross and causal forms; the causal one decodes with a state of constant size."
    ),
    implements=(
        "manyheads.attention.flow",
        "manyheads.attention.FlowAttention",
        "manyheads.models.language.flowformer.FlowformerGPT",
        "manyheads.models.language.flowformer_classifier.FlowformerClassifier",
        "manyheads.models.vision.flowformer.FlowformerVision",
    ),
    recipe="manyheads train lm --mixers flow*4",
    claim=Claim(
        statement=(
            "A drop-in replacement of softmax attention with linear cost, whose conserved flows "
            "bring competition among sources without locality or random features."
        ),
        measure=measure,
    ),
)
