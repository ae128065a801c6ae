"""MobileViG: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.grid.svga import svga, svga_reference
from manyheads.choose.memory import peak_memory
from manyheads.choose.mobile import PHONE, build, has_onnx, measure_eager, measure_onnx
from manyheads.choose.timing import forward, interleaved
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER"]

_MOBILENET = "mobilenetv2_140"
_PHONE = PHONE["iPhone 13 mini"]

Progress = Callable[[str], None]


def nearest_differences(x: Tensor, *, neighbours: int = 9) -> Tensor:
    """Return the largest differences from the nearest places by features, as vision GNNs search.

    O(N² C): what SVGA's fixed graph does without.
    """
    tokens = F.normalize(x.flatten(2).mT, dim=-1)  # (B, N, C)
    nearest = torch.cdist(tokens, tokens).topk(neighbours, largest=False).indices
    places = x.flatten(2).mT
    linked = torch.stack([row[index] for row, index in zip(places, nearest, strict=True)])
    return (places[:, :, None] - linked).amax(2).mT.reshape(x.shape)


def measure(progress: Progress) -> Measurement:
    """Measure the graph against a search for neighbours, growth, and other backbones."""
    progress("SVGA against nearest neighbours")
    x = torch.randn(1, 128, 28, 28)
    pair = interleaved(
        {"svga": forward(svga, x), "nearest": forward(nearest_differences, x)}, repeats=7
    )
    faster = pair["nearest"].median / pair["svga"].median
    memory = peak_memory(svga, x).peak_bytes / x.nbytes
    same = torch.equal(svga(x), svga_reference(x))
    progress("448 px against 224 px")
    model = build("mobilevig_ti")
    grown = interleaved(
        {str(side): forward(model, torch.randn(1, 3, side, side)) for side in (224, 448)},
        repeats=7,
    )
    growth = grown["448"].median / grown["224"].median
    progress("B against EfficientFormer-L3 in PyTorch")
    times = measure_eager(("mobilevig_b", "efficientformer_l3"))
    large = times["mobilevig_b"].median / times["efficientformer_l3"].median
    phone = _PHONE["mobilevig_b"] / _PHONE["efficientformer_l3"]
    checks = [
        Check(
            what="nearest-neighbour graph over SVGA, 28 x 28 places, forward",
            claimed="no search for neighbours",
            measured=faster,
            unit="x",
            direction=faster > 1,
            size=faster >= 3,
            bound="at least 3",
        ),
        Check(
            what="tensor memory of SVGA over the map's",
            claimed="no N x N matrix",
            measured=memory,
            unit="x",
            direction=same,
            size=memory <= 6,
            bound="at most 6, and equal to the graph link by link",
        ),
        Check(
            what="time of Ti at 448 px over its time at 224 px",
            claimed="linear in places",
            measured=growth,
            unit="x",
            direction=growth < 8,
            size=growth < 4.6,
            bound="below 4.6",
        ),
        Check(
            what="time of B over EfficientFormer-L3's, both folded, in PyTorch",
            claimed=f"{phone:.2f} on the phone",
            measured=large,
            unit="x",
            direction=large < 1,
            size=large <= 1.1 * phone,
            bound=f"at most {1.1 * phone:.2f}",
        ),
    ]
    figures = {"eager_seconds": {n: t.median for n, t in times.items()},
               "phone_milliseconds": _PHONE}  # fmt: skip
    notes = ["the phone's neural processor, ImageNet and COCO were not re-measured"]
    if has_onnx():
        onnx = measure_onnx(("mobilevig_ti", "mobilevig_b", _MOBILENET), progress)
        figures["onnx_seconds"] = {n: t.median for n, t in onnx.items()}
        for name in ("mobilevig_ti", "mobilevig_b"):
            ratio = onnx[name].median / onnx[_MOBILENET].median
            published = _PHONE[name] / _PHONE[_MOBILENET]
            checks.append(
                Check(
                    what=f"time of {name} over MobileNetV2x1.4's, in ONNX Runtime here",
                    claimed=f"{published:.2f} on the phone",
                    measured=ratio,
                    unit="x",
                    direction=(ratio < 1) == (published < 1),
                    size=ratio <= 1.15 * max(published, 1),
                    bound=f"at most {1.15 * max(published, 1):.2f}",
                )
            )
    else:
        notes.append("timm, onnxruntime and onnxscript are needed to compare with MobileNetV2")
    return Measurement(checks=tuple(checks), figures=figures, notes=tuple(notes))


PAPER = Paper(
    slug="mobilevig",
    title="MobileViG: Graph-Based Sparse Attention for Mobile Vision Applications",
    arxiv="2307.00395",
    summary=(
        "Inverted residuals on large maps, and on the last one a graph that never changes: every "
        "place takes the largest difference from every second place of its row and column. "
        "Shifts, minima and 1 x 1 convolutions alone, for images of any size."
    ),
    implements=(
        "manyheads.attention.grid.svga.svga",
        "manyheads.attention.grid.svga.SVGA",
        "manyheads.models.vision.mobilevig.MobileViG",
    ),
    recipe="manyheads train vision --model mobilevig_ti --data images",
    claim=Claim(
        statement=(
            "Ti is faster than MobileNetV2x1.4 at 75.7 % on ImageNet; B is faster and more "
            "accurate than EfficientFormer-L3."
        ),
        measure=measure,
    ),
)
