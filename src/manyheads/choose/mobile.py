"""Mobile backbones side by side: in PyTorch, and exported and run by ONNX Runtime.

Phones have no place here: what is compared are ratios on this machine's processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from manyheads.choose.timing import Timings, forward, interleaved
from manyheads.errors import require_extra
from manyheads.models import create_model, list_models
from manyheads.models.vision.base import VisionModel

__all__ = ["PHONE", "build", "compare_onnx", "has_onnx", "measure_eager", "measure_onnx"]

Progress = Callable[[str], None]

# Milliseconds of a phone's neural processor, one image, as EfficientFormer's (iPhone 12) and
# MobileViG's (iPhone 13 mini) authors published them: two phones that do not compare.
PHONE: dict[str, dict[str, float]] = {
    "iPhone 12": {"efficientformer_l1": 1.6, "mobilenetv2_140": 1.6},
    "iPhone 13 mini": {
        "mobilevig_ti": 0.78,
        "mobilevig_b": 2.30,
        "mobilenetv2_140": 1.02,
        "efficientformer_l3": 2.77,
    },
}


def has_onnx() -> bool:
    """Return whether what :func:`measure_onnx` needs is installed."""
    return all(find_spec(m) is not None for m in ("timm", "onnxruntime", "onnxscript"))


def build(name: str) -> nn.Module:
    """Return a model of ours, folded for inference, or timm's of that name, for inference.

    Weights are random, layer scales and norms as they begin: times do not depend on them.
    """
    torch.manual_seed(0)
    if name in list_models():
        model = create_model(name).eval()
        return model.fuse() if isinstance(model, VisionModel) else model
    require_extra("timm", "vision", f"timm's {name}")
    import timm

    return timm.create_model(name).eval()


def measure_eager(names: Sequence[str], *, side: int = 224, repeats: int = 7) -> Timings:
    """Time models in PyTorch on one image, interleaved."""
    x = torch.randn(1, 3, side, side)
    return interleaved({n: forward(build(n), x) for n in names}, repeats=repeats)


def measure_onnx(
    names: Sequence[str],
    progress: Progress = lambda text: None,
    *,
    side: int = 224,
    repeats: int = 15,
) -> Timings:
    """Export models to ONNX and time them in ONNX Runtime on one image, interleaved.

    Args:
        names: of :func:`manyheads.models.create_model` or of timm.
        progress: told what is exported.
        side: of the image.
        repeats: rounds.

    Raises:
        MissingExtraError: timm, onnxruntime or onnxscript is not installed.
        ValueError: the exported model's outputs differ from the model's.
    """
    require_extra("onnxruntime", "vision", "ONNX Runtime's times")
    require_extra("onnxscript", "vision", "the export to ONNX")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads of one model would take the cores from the next one, whose turn it is.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    x = torch.randn(1, 3, side, side)
    calls: dict[str, Callable[[], Any]] = {}
    with TemporaryDirectory() as folder:
        for name in names:
            progress(f"{name} to ONNX")
            model, path = build(name), str(Path(folder) / f"{name}.onnx")
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            feed = {session.get_inputs()[0].name: x.numpy()}
            with torch.no_grad():
                expected = model(x)
            (found,) = session.run(None, feed)
            error = float((torch.from_numpy(found) - expected).abs().max())
            if error > 1e-3 * float(expected.abs().max()):
                raise ValueError(f"{name} in ONNX Runtime differs by {error:.1e} from PyTorch")
            calls[name] = lambda session=session, feed=feed: session.run(None, feed)  # type: ignore[misc]
        progress("in ONNX Runtime")
        return interleaved(calls, repeats=repeats)


def compare_onnx(
    progress: Progress = lambda text: None,
    *,
    names: Sequence[str] = ("efficientformer_l1", "mobilevig_ti", "mobilevig_b"),
    references: Sequence[str] = ("mobilenetv2_140", "poolformer_s12"),
    side: int = 224,
    repeats: int = 15,
) -> dict[str, Any]:
    """Compare backbones with references in ONNX Runtime; about a minute and a half.

    Returns:
        ``seconds`` by model, and ``rows``: model, reference, their times' ratio here, and by phone
        the published one where both were measured on it.
    """
    times = measure_onnx((*names, *references), progress, side=side, repeats=repeats)
    rows = [
        {
            "model": name,
            "reference": reference,
            "here": times[name].median / times[reference].median,
            "phones": {
                phone: figures[name] / figures[reference]
                for phone, figures in PHONE.items()
                if name in figures and reference in figures
            },
        }
        for name in names
        for reference in references
    ]
    return {"seconds": {n: t.to_dict() for n, t in times.items()}, "rows": rows}
