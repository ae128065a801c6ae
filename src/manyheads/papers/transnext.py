"""TransNeXt: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from manyheads.attention.aggregated import AggregatedAttention
from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import forward, interleaved
from manyheads.models.base import create_model
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "entropy_growth", "measure", "seen_share"]

_REPEATS = 5
_SHORT, _LONG = 224, 448
_CONVNEXT_B = 88.6e6  # parameters, as published

Progress = Callable[[str], None]


def measure(progress: Progress) -> Measurement:
    """Measure speed and memory against unfolded windows, growth with pixels, reach, sharpness."""
    torch.manual_seed(0)
    count = create_model("transnext_tiny", device="meta").num_parameters()
    progress(f"TransNeXt-Tiny at {_SHORT} pixels")
    against = _against_unfolding()
    speedup = against["unfold"] / against["shift"]
    progress("memory of one layer, forward and backward")
    memory = {name: _layer_memory(name) for name in ("shift", "reference")}
    progress(f"from {_SHORT} to {_LONG} pixels")
    growth = _growth()
    plain, scaled = entropy_growth()
    seen = seen_share()
    return Measurement(
        checks=(
            Check(
                what="parameters of TransNeXt-Tiny, below ConvNeXt-B's by",
                claimed="69 % fewer than ConvNeXt-B's 88.6M",
                measured=100 * (1 - count / _CONVNEXT_B),
                unit="%",
                direction=count < _CONVNEXT_B,
                size=count == 28_258_960,
                bound=f"28,258,960 exactly; here {count:,}",
            ),
            Check(
                what=f"TransNeXt-Tiny at {_SHORT} px by shifts, over unfolded windows, forward",
                claimed="the CUDA extension is faster than unfolding; equal outputs",
                measured=speedup,
                unit="x",
                direction=speedup > 1,
                size=speedup >= 1.5,
                bound="at least 1.5",
            ),
            Check(
                what="peak memory of a layer on 56 x 56, unfolded over shifts",
                claimed="unfolding holds 18 maps",
                measured=memory["reference"] / memory["shift"],
                unit="x",
                direction=memory["reference"] > memory["shift"],
                size=memory["reference"] > 1.5 * memory["shift"],
                bound="above 1.5",
            ),
            Check(
                what=f"time of a layer at {_LONG} over {_SHORT} px, pooled map of fixed size",
                claimed="linear in pixels: 4x",
                measured=growth["fixed"],
                unit="x",
                direction=growth["fixed"] < growth["pooled"],
                size=growth["fixed"] < 5.5,
                bound=f"below 5.5; pooled map that grows: {growth['pooled']:.1f}",
            ),
            Check(
                what="share of pixels that one place reads in one layer",
                claimed="global perception in every layer",
                measured=seen,
                direction=seen > 9 / 56**2,
                size=seen == 1,
                bound="exactly 1",
            ),
            Check(
                what="growth of entropy from 64 to 4,096 keys, with the log of the length",
                claimed="entropy stays put when the length grows",
                measured=scaled,
                unit="nats",
                direction=scaled < plain,
                size=scaled < 0.5 * plain,
                bound=f"below half of what it is without, {plain:.2f}",
            ),
        ),
        figures={
            "forward_seconds": against,
            "layer_peak_bytes": memory,
            "growth_448_over_224": growth,
            "entropy_growth": {"plain": plain, "scaled": scaled},
        },
        notes=(
            "accuracy on ImageNet, ImageNet-A, COCO and ADE20K was not re-measured",
            "shifts: the form for inference, fuse(), which keeps position biases of a size",
        ),
    )


def _against_unfolding() -> dict[str, float]:
    x = torch.randn(1, 3, _SHORT, _SHORT)
    unfold = create_model("transnext_tiny", implementation="reference").eval()
    shift = create_model("transnext_tiny", weights=unfold.to_official()).eval()
    timings = interleaved(
        {
            "unfold": forward(unfold, x),
            "unfused": forward(shift, x),
            "shift": forward(shift.fuse(), x),
        },
        repeats=_REPEATS,
    )
    return {name: t.median for name, t in timings.items()}


def _layer(**options: object) -> AggregatedAttention:
    values = {"num_heads": 3, "sr_ratio": 8, "pretrain_grid": (56, 56)}
    return AggregatedAttention(72, **(values | options))  # type: ignore[arg-type]


def _layer_memory(implementation: str) -> int:
    layer = _layer(implementation=implementation)
    x = torch.randn(1, 72, 56, 56).contiguous(memory_format=torch.channels_last)

    def both() -> None:
        layer(x).sum().backward()

    return peak_memory(both).peak_bytes


def _growth() -> dict[str, float]:
    layers: dict[str, nn.Module] = {"fixed": _layer(fixed_pool_size=7), "pooled": _layer()}
    calls = {}
    for name, layer in layers.items():
        for side in (_SHORT, _LONG):
            x = torch.randn(1, 72, side // 4, side // 4)
            x = x.contiguous(memory_format=torch.channels_last)
            calls[f"{name} {side}"] = forward(layer.eval(), x)
    timings = interleaved(calls, repeats=_REPEATS)
    return {
        name: timings[f"{name} {_LONG}"].median / timings[f"{name} {_SHORT}"].median
        for name in layers
    }


def seen_share() -> float:
    """Return the share of places whose input moves the output at the first place of one layer."""
    torch.manual_seed(0)
    x = torch.randn(1, 72, 56, 56, requires_grad=True)
    _layer()(x)[0, :, 0, 0].square().sum().backward()
    assert x.grad is not None
    return float((x.grad.abs().sum((0, 1)) > 0).float().mean())


def entropy_growth() -> tuple[float, float]:
    """Return how much attention's entropy grows from 64 to 4,096 random keys, in nats.

    Without and with the log of the number of keys in the scale of the cosines.
    """
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(200, 24, generator=generator), dim=-1)
    found = []
    for count in (64, 4096):
        key = F.normalize(torch.randn(count, 24, generator=generator), dim=-1)
        scales = torch.tensor([1 / 0.24, 1 / 0.24 * float(torch.tensor(count).log())])
        weights = (scales[:, None, None] * (query @ key.mT)).softmax(-1)
        found.append(torch.special.entr(weights).sum(-1).mean(-1))
    plain, scaled = (found[1] - found[0]).tolist()
    return plain, scaled


PAPER = Paper(
    slug="transnext",
    title="TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
    arxiv="2311.17132",
    summary=(
        "A four-stage backbone whose attention lets each place see a 3 x 3 window finely and a "
        "pooled view of the whole map coarsely, under one softmax, with learned keys beside. "
        "Cosine scores scaled by the log of the length and position biases on logarithmic "
        "coordinates carry it to other resolutions. Its MLP is gated by a depthwise convolution."
    ),
    implements=(
        "manyheads.attention.aggregated.aggregated",
        "manyheads.attention.aggregated.AggregatedAttention",
        "manyheads.attention.aggregated.LengthScaledAttention",
        "manyheads.models.vision.transnext.ConvGLU",
        "manyheads.models.vision.transnext.TransNeXt",
    ),
    recipe="manyheads train vision --model transnext_micro --data images",
    claim=Claim(
        statement=(
            "Every layer perceives the whole map at the cost of a window and a few pooled keys, "
            "so that a model of 28M parameters reaches what ConvNeXt-B needs 89M for."
        ),
        measure=measure,
    ),
)
