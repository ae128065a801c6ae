"""Quantizable Transformers: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.attention import clip_softmax
from manyheads.choose.timing import forward, interleaved
from manyheads.compress.quantizable import Int8Linear
from manyheads.models.base import create_model
from manyheads.models.language.quantizable import BERTSelfAttention, QuantizableConfig
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "measure"]

_DIM, _HEADS, _LENGTH = 32, 2, 33
_STEPS, _RATE = 800, 5e-3
_SHARE = 0.25  # of the tokens that have something to add
_ROWS, _WIDTH = 32, 768
_KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "clipped": {"alpha": 0.5, "max_length": _LENGTH},
    "gated": {"gate": "per_token", "gate_net": "all_features", "gate_init": None},
}

Progress = Callable[[str], None]


def _batch(generator: torch.Generator, matrix: Tensor, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return tokens, and what is to be added to them: to a quarter the mean of all, to others 0.

    Token 0 is always the same: the one a softmax can be parked at, with a value of 0.
    """
    x = torch.randn(size, _LENGTH, _DIM, generator=generator)
    marked = torch.rand(size, _LENGTH, generator=generator) < _SHARE
    x[..., 0] = torch.where(marked, 2.0, -2.0)
    x[:, 0] = 0.0
    x[:, 0, 1] = 4.0
    mean = (x[:, 1:] @ matrix).mean(1, keepdim=True) * 4
    return x, mean * marked[..., None]


def _idle_heads(kind: str, progress: Progress) -> dict[str, float]:
    """Train one layer to add nothing to most tokens; return its error and largest score."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = BERTSelfAttention(_DIM, _HEADS, QuantizableConfig(**_KINDS[kind]))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(_DIM, _DIM, generator=generator) / _DIM**0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, _STEPS)
    for step in range(_STEPS):
        if step % 200 == 0:
            progress(f"heads that add nothing, {kind}: step {step} of {_STEPS}")
        x, target = _batch(generator, matrix)
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    scores: list[Tensor] = []
    layer.scores_tap.register_forward_hook(lambda _, __, out: scores.append(out))
    with torch.no_grad():
        x, target = _batch(generator, matrix, size=256)
        out = layer.out_proj(layer.context(x).context)
    error = (out - target).square().mean() / target.square().mean()
    spread = scores[0].amax(-1) - scores[0].amin(-1)
    return {"error": float(error), "spread": float(spread.max()), "mean": float(spread.mean())}


def measure(progress: Progress) -> Measurement:
    """Measure what idle heads cost, exact zeros, the time and bytes of INT8, and parameters."""
    idle = {kind: _idle_heads(kind, progress) for kind in _KINDS}
    progress("integers and floats")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(_WIDTH, _WIDTH).eval()
        x = torch.randn(_ROWS, _WIDTH)
        scores = torch.randn(64, 128)
    small = Int8Linear.from_float(linear).eval()
    with torch.no_grad():
        timings = interleaved({"float": forward(linear, x), "int8": forward(small, x)}, repeats=30)
        error = float((small(x) - linear(x)).norm() / linear(x).norm())
    speedup = timings["float"].median / timings["int8"].median
    held = sum(t.numel() * t.element_size() for t in small.state_dict().values())
    whole = sum(t.numel() * t.element_size() for t in linear.state_dict().values())
    zeros = float((clip_softmax(scores, gamma=-0.03) == 0).float().mean())
    ratio = idle["gated"]["spread"] / idle["softmax"]["spread"]
    names = ("bert_base_vanilla", "bert_base_clipped", "bert_base_gated_mlp")
    counts = [create_model(n, device="meta").num_parameters() for n in names]
    return Measurement(
        checks=(
            Check(
                what="widest row of scores, gated over softmax attention, most tokens idle",
                claimed="without a gate idle heads drive scores far apart",
                measured=ratio,
                unit="x",
                direction=ratio < 1,
                size=ratio < 0.5,
                bound="below 0.5",
            ),
            Check(
                what="error left where most tokens are to get nothing, gated over softmax",
                claimed="quality is kept",
                measured=idle["gated"]["error"] / idle["softmax"]["error"],
                unit="x",
                direction=idle["gated"]["error"] < 1,
                size=idle["gated"]["error"] <= idle["softmax"]["error"],
                bound="at most 1",
            ),
            Check(
                what="share of exact zeros, clipped softmax of 128 normal scores, gamma -0.03",
                claimed="zeros are reached at finite scores",
                measured=zeros,
                direction=zeros > 0,
                size=zeros > 0.5,
                bound="above 0.5; a softmax has none",
            ),
            Check(
                what="a 768 x 768 matrix on 32 tokens, float32 over INT8 with inputs quantised",
                claimed="INT8 is faster",
                measured=speedup,
                unit="x",
                direction=speedup > 1,
                size=speedup >= 1.4,
                bound=f"at least 1.4; relative error {error:.4f}",
            ),
            Check(
                what="bytes of that layer, INT8 over float32",
                claimed="a quarter",
                measured=held / whole,
                direction=held < whole,
                size=held / whole < 0.27,
                bound="below 0.27",
            ),
            Check(
                what="parameters of BERT-base that MLP gates add; clipping adds none",
                claimed="152,208",
                measured=counts[2] - counts[0],
                direction=counts[1] == counts[0],
                size=counts[2] - counts[0] == 152_208,
                bound="152,208 of the official code",
            ),
        ),
        figures={"idle_heads": idle, "int8_error": error},
        notes=(
            "the published perplexities need a pre-training of a million steps: not re-measured; "
            "outliers of activations grow with training and do not show in a model of a minute",
            "idle heads: one layer adds the mean of all tokens to a quarter of them, else nothing",
        ),
    )


PAPER = Paper(
    slug="quantizable",
    title=("Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing"),
    arxiv="2306.12929",
    summary=(
        "Heads that have nothing to add drive their scores far apart to reach weights near zero, "
        "and leave outliers in activations that break 8-bit quantisation. A clipped softmax or a "
        "gate on each head, in training, takes the reason away; INT8 follows without loss."
    ),
    implements=(
        "manyheads.attention.clipped_softmax.clipped_softmax",
        "manyheads.attention.gated.gated",
        "manyheads.models.language.quantizable.QuantizableBERT",
        "manyheads.models.language.quantizable.QuantizableOPT",
        "manyheads.compress.quantizable.Int8",
        "manyheads.compress.quantizable.simulate_quantization",
    ),
    recipe="manyheads train lm --mixers gated*4",
    claim=Claim(
        statement=(
            "Clipped softmax and gated attention remove the outliers of activations, so that "
            "models quantise to 8 bits with no loss beside their floating-point quality."
        ),
        measure=measure,
    ),
)
