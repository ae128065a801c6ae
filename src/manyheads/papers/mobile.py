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

__all__ = ["build", "has_onnx", "measure_eager", "measure_onnx"]

Progress = Callable[[str], None]


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
