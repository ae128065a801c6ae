"""Orchid: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention import (
    circular_conv,
    circular_conv_reference,
    conditioning_type1,
    conditioning_type2,
    orchid,
    softmax,
)
from manyheads.choose.timing import crossover, forward_backward, interleaved
from manyheads.data.synthetic import RecallConfig, get_task
from manyheads.models import create_model
from manyheads.models.language.orchid import OrchidEncoderConfig, OrchidForMaskedLM
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "direct_sum_error", "recall_accuracy", "shift_error"]

_HEADS, _DIM = 8, 64
_LENGTHS = (256, 512, 1024, 2048)
_RECALL = RecallConfig(vocab_size=10, length=32, pairs=4, filler="zero", power=0.5)
_STEPS, _BATCH, _RATE = 400, 64, 1e-2
_BERT_BASE = 110e6

Progress = Callable[[str], None]


def _inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, _HEADS, length, _DIM, generator=generator) for _ in range(4)]


def measure(progress: Progress) -> Measurement:
    """Measure equality with the sum, equivariance, growth, the crossover, recall and size."""
    errors = {kind: shift_error(kind) for kind in ("type1", "type2", "phase")}
    worst = max(errors["type1"], errors["type2"])
    direct = max(direct_sum_error(n) for n in (255, 256))
    crossing, times = _crossover(progress)
    growth, long_times = _growth(progress)
    recall = {kind: recall_accuracy(kind, progress=progress) for kind in ("type1", "type2")}
    count = create_model("orchid_bert_base", device="meta").num_parameters()
    reach = crossing if crossing is not None else float("inf")
    return Measurement(
        checks=(
            Check(
                what="FFT against the direct circular sum, largest relative difference",
                claimed="the convolution is computed in O(N log N)",
                measured=direct,
                direction=direct < 1e-4,
                size=direct < 1e-5,
                bound="below 1e-5 at 255 and 256 tokens",
            ),
            Check(
                what="shifted output against output of the shifted input, types I and II",
                claimed="shift equivariant",
                measured=worst,
                direction=worst < 1e-2 * errors["phase"],
                size=worst < 1e-5,
                bound=f"below 1e-5; a kernel that keeps the phase: {errors['phase']:.2g}",
            ),
            Check(
                what="time at 16,384 over time at 4,096, forward and backward",
                claimed="O(N log N)",
                measured=growth,
                unit="x",
                direction=growth < 16,
                size=growth < 6,
                bound="below 6; quadratic would be 16",
            ),
            Check(
                what="length from which forward and backward beat softmax",
                claimed="faster than attention on long sequences",
                measured=reach,
                unit="tokens",
                direction=crossing is not None,
                size=reach <= 2048,
                bound="at most 2,048, the mixing without its kernel network",
            ),
            Check(
                what="accuracy on associative recall, 10 ids, 32 tokens, 2 layers, type I",
                claimed="solves associative recall",
                measured=recall["type1"],
                direction=recall["type1"] > 0.5,
                size=recall["type1"] > 0.9,
                bound="above 0.9; guessing among the values 0.2",
            ),
            Check(
                what="parameters of Orchid-BERT-base over BERT-base's 110M",
                claimed="77M, 30 % fewer",
                measured=count / _BERT_BASE,
                unit="x",
                direction=count < _BERT_BASE,
                size=abs(count / _BERT_BASE - 0.7) < 0.01,
                bound="0.69 to 0.71",
            ),
        ),
        figures={
            "shift_error": errors,
            "forward_backward_seconds": times,
            "long_seconds": long_times,
            "recall": recall,
            "recall_task": _RECALL.to_dict() | {"steps": _STEPS, "batch": _BATCH},
            "parameters": count,
        },
        notes=(
            f"recall with type II in as many steps: {recall['type2']:.2f}",
            "the encoders around the mixing layer are a reconstruction: their widths were not "
            "published",
            "GLUE and ImageNet accuracies and recall at 128K tokens were not re-measured",
        ),
    )


def direct_sum_error(length: int) -> float:
    """Return rms(FFT - direct sum) over rms(direct sum), in float32."""
    generator = torch.Generator().manual_seed(length)
    x, kernel = (torch.randn(2, length, 16, generator=generator) for _ in range(2))
    exact = circular_conv_reference(x.double(), kernel.double())
    difference = circular_conv(x, kernel) - exact
    return float(difference.square().mean().sqrt() / exact.square().mean().sqrt())


def shift_error(kind: str, *, length: int = 65) -> float:
    """Return how far the core is from commuting with a shift, relative to its output.

    "phase" is a kernel made of the spectrum itself, whose phase a shift changes.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    x, time, other, frequency = draw(2, length, 16), draw(16, 3), draw(16, 3), draw(16, 3)

    def core(x: Tensor) -> Tensor:
        if kind == "type1":
            spectrum = conditioning_type1(x, time, frequency)
        elif kind == "type2":
            spectrum = conditioning_type2(x, time, other, frequency)
        else:
            spectrum = torch.fft.rfft(x, dim=1)
        return circular_conv(x, spectrum, domain="frequency")

    expected = core(x).roll(7, 1)
    difference = core(x.roll(7, 1)) - expected
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


def _crossover(progress: Progress) -> tuple[float | None, dict[str, list[float]]]:
    times: dict[str, list[float]] = {"orchid": [], "softmax": []}
    for length in _LENGTHS:
        progress(f"forward and backward at {length:,} tokens")
        inputs = [t.requires_grad_() for t in _inputs(length)]
        measured = interleaved(
            {
                "orchid": forward_backward(orchid, *inputs),
                "softmax": forward_backward(softmax, *inputs[:3]),
            },
            repeats=3,
        )
        for name, timing in measured.items():
            times[name].append(timing.median)
    return crossover(_LENGTHS, times["orchid"], times["softmax"]), times


def _growth(progress: Progress) -> tuple[float, list[float]]:
    progress("forward and backward at 4,096 and 16,384 tokens")
    inputs = {n: [t.requires_grad_() for t in _inputs(n)] for n in (4096, 16384)}
    measured = interleaved(
        {str(n): forward_backward(orchid, *tensors) for n, tensors in inputs.items()}, repeats=5
    )
    times = [t.median for t in measured.values()]
    return times[1] / times[0], times


def recall_accuracy(
    kind: str,
    *,
    steps: int = _STEPS,
    progress: Progress = lambda _: None,
) -> float:
    """Train a model of two layers on associative recall; return its held-out accuracy."""
    task = get_task("recall")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = OrchidForMaskedLM(
            OrchidEncoderConfig(
                vocab_size=_RECALL.vocab_size, embed_dim=64, num_layers=2, mlp_width=128,
                mlp_blocks=1, gated_mlp=False, max_length=_RECALL.length, segments=0,
                padding_id=None, dropout=0.0,
                init_std=0.1,  # at 0.02 the products of three narrow projections start near zero
                mixer={
                    "conditioning": kind, "filter_width": 32, "filter_features": 5,
                    "filter_frequency": 1.0,
                },
            )
        )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1)
    for step in range(steps):
        if step % 50 == 0:
            progress(f"recall, {kind}: step {step} of {steps}")
        first = step * _BATCH
        inputs, targets, _ = task.batch(
            _RECALL, seed=0, indices=range(first, first + _BATCH), fold="train"
        )
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 30) * (1 - step / steps)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    inputs, targets, _ = task.batch(_RECALL, seed=1, indices=range(256), fold="held_out")
    with torch.no_grad():
        guessed = model.eval()(inputs).argmax(-1)
    real = targets != -100
    return float((guessed == targets)[real].float().mean())


PAPER = Paper(
    slug="orchid",
    title="Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling",
    arxiv="2402.18508",
    summary=(
        "A mixing layer for encoders: a circular convolution as long as the sequence, whose "
        "kernel a small network makes from the input so that shifts pass through unchanged, "
        "between two gates. Its cost grows as N log N. Not causal."
    ),
    implements=(
        "manyheads.attention.orchid",
        "manyheads.attention.OrchidAttention",
        "manyheads.models.language.orchid.OrchidForMaskedLM",
        "manyheads.models.vision.orchid.OrchidVision",
    ),
    recipe="manyheads train classify --mixers orchid*4",
    claim=Claim(
        statement=(
            "A data-dependent convolution that commutes with shifts solves associative recall in "
            "O(N log N) and gives BERT- and ViT-like encoders with 30 % fewer parameters."
        ),
        measure=measure,
    ),
)
