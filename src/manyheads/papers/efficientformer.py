"""EfficientFormer: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch

from manyheads.choose.mobile import PHONE, has_onnx, measure_eager, measure_onnx
from manyheads.choose.timing import forward, interleaved
from manyheads.models import create_model
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER"]

_MOBILENET = "mobilenetv2_140"
_PHONE = PHONE["iPhone 12"]

Progress = Callable[[str], None]


def measure(progress: Progress) -> Measurement:
    """Measure L1 against PoolFormer-S12, against itself unfolded, and against MobileNetV2."""
    names = ("efficientformer_l1", "poolformer_s12")
    progress("against PoolFormer-S12 in PyTorch")
    times = measure_eager(names)
    pool = times["efficientformer_l1"].median / times["poolformer_s12"].median
    progress("folded against not folded")
    folding, error = _folding()
    checks = [
        Check(
            what="time of L1 over PoolFormer-S12's, both folded, 224 px",
            claimed="faster than PoolFormer",
            measured=pool,
            unit="x",
            direction=pool < 1,
            size=pool <= 0.9,
            bound="at most 0.9",
        ),
        Check(
            what="time of L1 over its time with norms and scales folded away",
            claimed="operators that fold into convolutions",
            measured=folding,
            unit="x",
            direction=folding > 1,
            size=folding >= 1.1,
            bound="at least 1.1",
        ),
        Check(
            what="largest difference of the folded model's logits over the largest logit",
            claimed="folding changes nothing",
            measured=error,
            direction=error < 1e-4,
            size=error <= 1e-5,
            bound="at most 1e-5",
        ),
    ]
    figures = {"eager_seconds": {n: t.median for n, t in times.items()}}
    notes = ["the phone's neural processor and accuracy on ImageNet were not re-measured"]
    if has_onnx():
        onnx = measure_onnx((*names, _MOBILENET), progress)
        figures["onnx_seconds"] = {n: t.median for n, t in onnx.items()}
        figures["phone_milliseconds"] = _PHONE
        ratio = onnx["efficientformer_l1"].median / onnx[_MOBILENET].median
        phone = _PHONE["efficientformer_l1"] / _PHONE[_MOBILENET]
        checks.append(
            Check(
                what="time of L1 over MobileNetV2x1.4's, both in ONNX Runtime on this processor",
                claimed=f"{phone:.1f} on the phone",
                measured=ratio,
                unit="x",
                direction=ratio <= 1.1,
                size=ratio <= 1.1,
                bound="at most 1.1",
            )
        )
    else:
        notes.append("timm, onnxruntime and onnxscript are needed to compare with MobileNetV2")
    return Measurement(checks=tuple(checks), figures=figures, notes=tuple(notes))


def _folding() -> tuple[float, float]:
    """Return times of the whole over the folded L1, and the difference of their logits."""
    torch.manual_seed(0)
    model = create_model("efficientformer_l1").eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.1)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    fused, x = model.fuse(), torch.randn(1, 3, 224, 224)
    times = interleaved({"whole": forward(model, x), "folded": forward(fused, x)}, repeats=7)
    with torch.no_grad():
        expected = model(x)
        error = float((fused(x) - expected).abs().max() / expected.abs().max())
    return times["whole"].median / times["folded"].median, error


PAPER = Paper(
    slug="efficientformer",
    title="EfficientFormer: Vision Transformers at MobileNet Speed",
    arxiv="2206.01191",
    summary=(
        "A backbone of operators that phones are fast at: pooling and 1 x 1 convolutions whose "
        "batch norms fold away, and attention with biases by distance on the last 49 tokens "
        "alone. Two classifiers, of which one learns from a teacher. The slimming search that "
        "found its sizes was not published: ours is a reconstruction."
    ),
    implements=(
        "manyheads.attention.grid.distance.DistanceAttention",
        "manyheads.models.vision.efficientformer.EfficientFormer",
        "manyheads.models.vision.efficientformer.supernet.Supernet",
        "manyheads.models.vision.efficientformer.slim.slim",
        "manyheads.choose.latency.measure_latencies",
        "manyheads.train.distillation.distillation_loss",
    ),
    recipe="manyheads train vision --model efficientformer_l1 --data images",
    claim=Claim(
        statement=(
            "L1 reaches 79.2 % on ImageNet in the 1.6 ms that MobileNetV2x1.4 takes for 74.7 % on "
            "a phone, and is faster than PoolFormer and DeiT."
        ),
        measure=measure,
    ),
)
