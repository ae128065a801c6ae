"""Aaren: its card and its claim."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import (
    aaren,
    aaren_step,
    aaren_update,
    prefix_attention,
    softmax,
    softmax_update,
)
from manyheads.choose.timing import forward, interleaved
from manyheads.data.synthetic import RunningConfig, TaskBatches, get_task
from manyheads.layers.state import state_bytes
from manyheads.models.base import create_model
from manyheads.models.language.aaren import AarenStack, AarenStackConfig
from manyheads.papers.base import Check, Claim, Measurement, Paper
from manyheads.papers.small import fit

__all__ = ["PAPER", "measure"]

_HEADS, _DIM = 8, 64
_FEW, _MANY = 1000, 4000  # tokens of a stream
_EVERY = 80  # of its prefixes, how many are left out when recomputing is timed
_TASK = RunningConfig(length=64)
_STEPS, _BATCH, _RATE = 250, 32, 2e-3

Progress = Callable[[str], None]


def _inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(_HEADS, _DIM, generator=generator)
    key, value = torch.randn(2, 1, _HEADS, length, _DIM, generator=generator)
    return query, key, value


def measure(progress: Progress) -> Measurement:
    """Measure state and cache, cumulative and parallel time, parameters, exactness, toy tasks."""
    progress("states and caches")
    states, caches = zip(*(_held(length) for length in (10, 10_000)), strict=True)
    cumulative = _cumulative(progress)
    stream = cumulative["stream"][1] / cumulative["stream"][0]
    again = cumulative["recompute"][1] / cumulative["recompute"][0]
    scan = _scan(progress)
    growth = {name: times[1] / times[0] for name, times in scan.items()}
    ours = create_model("aaren_layer_512", device="meta").num_parameters()
    layer = nn.TransformerEncoderLayer(512, 8, 2048, device="meta")
    theirs = sum(p.numel() for p in layer.parameters())
    error = _error()
    tasks = {name: _explained(name, progress) for name in ("running_mean", "running_max")}
    checks = [
        Check(
            what="state after 10,000 tokens over after 10",
            claimed="constant memory",
            measured=states[1] / states[0],
            unit="x",
            direction=states[1] < caches[1],
            size=states[1] == states[0],
            bound=f"exactly 1; key-value cache {caches[1] / caches[0]:.0f}x",
        ),
        Check(
            what=f"cumulative time of {_MANY:,} steps over {_FEW:,}",
            claimed="linear",
            measured=stream,
            unit="x",
            direction=stream < again,
            size=3 < stream < 5.5,
            bound="between 3 and 5.5",
        ),
        Check(
            what="the same for causal softmax on every prefix anew",
            claimed="more than linear",
            measured=again,
            unit="x",
            direction=again > stream,
            size=again > 10,
            bound="above 10",
        ),
        Check(
            what="time of all prefixes at 8,192 tokens over 2,048",
            claimed="computed in parallel, linear work",
            measured=growth["aaren"],
            unit="x",
            direction=growth["aaren"] < growth["softmax"],
            size=growth["aaren"] < 5,
            bound=f"below 5; causal softmax {growth['softmax']:.1f}",
        ),
        Check(
            what="parameters of a layer with d=512, 8 heads, ff=2048",
            claimed="3,152,896 (Transformer: 3,152,384)",
            measured=ours,
            direction=ours > theirs,
            size=(ours, theirs) == (3_152_896, 3_152_384),
            bound=f"exactly; Transformer {theirs:,}",
        ),
        Check(
            what="largest difference from the softmax of each prefix, scores to ±450",
            claimed="equal to attention",
            measured=error,
            direction=error < 1e-3,
            size=error <= 1e-5,
            bound="at most 1e-5",
        ),
    ]
    for name, explained in tasks.items():
        gap = explained["aaren"] - explained["softmax"]
        checks.append(
            Check(
                what=f"variance explained on {name.replace('_', ' ')}, minus causal softmax's",
                claimed="comparable to Transformers",
                measured=gap,
                direction=explained["aaren"] > 0.5,
                size=gap > -0.05,
                bound=f"above -0.05; {explained['aaren']:.3f} to {explained['softmax']:.3f}",
            )
        )
    return Measurement(
        checks=tuple(checks),
        figures={
            "state_bytes": states,
            "cache_bytes": caches,
            "cumulative_seconds": cumulative,
            "forward_seconds": scan,
            "explained_variance": tasks,
            "task": _TASK.to_dict() | {"steps": _STEPS, "batch": _BATCH},
        },
        notes=(
            "quality on the paper's 38 data sets was not re-measured",
            f"recomputing was timed on every {_EVERY}th prefix",
        ),
    )


def _held(length: int) -> tuple[int, int]:
    """Return the bytes of Aaren's state and of a key-value cache after ``length`` tokens."""
    query, key, value = _inputs(length)
    _, state = aaren_update(None, query, key, value)
    _, cache = softmax_update(None, key, key, value)
    return state_bytes(state), state_bytes(cache[:2])


def _cumulative(progress: Progress) -> dict[str, list[float]]:
    """Return seconds for ``_FEW`` and for ``_MANY`` tokens that come one at a time."""
    query, key, value = _inputs(_MANY)

    def stream(length: int) -> Callable[[], None]:
        def run() -> None:
            _, state = aaren_update(None, query, key[:, :, :1], value[:, :, :1])
            for t in range(1, length):
                _, state = aaren_step(state, query, key[:, :, t], value[:, :, t])

        return forward(run)

    progress("a stream of tokens")
    timings = interleaved({str(n): stream(n) for n in (_FEW, _MANY)}, repeats=5)
    times = {"stream": [timings[str(n)].median for n in (_FEW, _MANY)], "recompute": [0.0, 0.0]}
    progress("every prefix anew")
    with torch.no_grad():
        for length in range(_EVERY, _MANY + 1, _EVERY):
            k, v = key[:, :, :length], value[:, :, :length]
            start = time.perf_counter()
            softmax(k, k, v, is_causal=True)
            seconds = (time.perf_counter() - start) * _EVERY
            times["recompute"][1] += seconds
            if length <= _FEW:
                times["recompute"][0] += seconds
    return times


def _scan(progress: Progress) -> dict[str, list[float]]:
    """Return seconds of one forward pass at 2,048 and at 8,192 tokens."""
    progress("all prefixes in parallel")
    calls = {}
    for length in (2048, 8192):
        query, key, value = _inputs(length)
        calls[f"aaren {length}"] = forward(aaren, query, key, value)
        calls[f"softmax {length}"] = forward(softmax, key, key, value, is_causal=True)
    timings = interleaved(calls, repeats=5)
    return {
        name: [timings[f"{name} {length}"].median for length in (2048, 8192)]
        for name in ("aaren", "softmax")
    }


def _error() -> float:
    """Return the largest difference of outputs from a softmax of each prefix in float64."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for largest in (1.0, 450.0):
        scores = (torch.rand(1, 2, 300, generator=generator) * 2 - 1) * largest
        values = torch.randn(1, 2, 300, 16, generator=generator)
        out, _ = prefix_attention(scores, values)
        for k in range(1, 301):
            weights = scores[..., :k].double().softmax(-1)[..., None]
            exact = (weights * values[:, :, :k].double()).sum(2)
            worst = max(worst, float((out[:, :, k - 1] - exact).abs().max()))
    return worst


class _Causal(nn.Module):
    """A causal torch encoder of the same sizes."""

    def __init__(self, config: AarenStackConfig) -> None:
        super().__init__()
        c = config
        layer = nn.TransformerEncoderLayer(
            c.embed_dim, c.num_heads, c.ff_dim, dropout=0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, c.num_layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.encoder(x, mask=mask, is_causal=True)


def _explained(name: str, progress: Progress) -> dict[str, float]:
    """Train both on a running statistic; return the share of held-out variance explained."""
    task, config = get_task(name), AarenStackConfig(
        embed_dim=64, num_heads=4, ff_dim=128, num_layers=2, dropout=0.0
    )  # fmt: skip
    builders: dict[str, Callable[[], nn.Module]] = {
        "aaren": lambda: AarenStack(config),
        "softmax": lambda: _Causal(config),
    }
    explained = {}
    for kind, build in builders.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 64), build(), nn.Linear(64, 1))
        fit(
            model,
            TaskBatches(task, _TASK, batch_size=_BATCH),
            F.mse_loss,
            torch.optim.AdamW(model.parameters(), lr=_RATE),
            steps=_STEPS,
            progress=lambda text, kind=kind: progress(f"{name}, {kind}: {text}"),  # type: ignore[misc]
        )
        inputs, targets, _ = task.batch(_TASK, seed=1, indices=range(256), fold="held_out")
        with torch.no_grad():
            left = F.mse_loss(model.eval()(inputs), targets)
        explained[kind] = 1 - float(left / targets.var())
    return explained


PAPER = Paper(
    slug="aaren",
    title="Attention as an RNN",
    arxiv="2405.13956",
    summary=(
        "Softmax attention with a fixed query is a recurrent network: two numbers and a "
        "vector a head hold all that a prefix says. Aaren learns one query a layer, computes "
        "every prefix in parallel with an associative scan, and streams in constant memory. One "
        "layer cannot look up content, because its query does not depend on the input."
    ),
    implements=(
        "manyheads.attention.aaren",
        "manyheads.attention.AarenAttention",
        "manyheads.models.language.aaren.AarenStack",
    ),
    recipe="manyheads train lm --mixers aaren*4",
    claim=Claim(
        statement=(
            "Streaming needs constant memory and linear cumulative time, with 0.016 % more "
            "parameters than a Transformer and comparable results."
        ),
        measure=measure,
    ),
    reconstruction=True,
)
