"""Backbones on images: fused against timm, fast forms against plain ones, two sizes, ONNX Runtime.

What is compared takes turns in one run; equal work is checked to give equal outputs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from manyheads.choose.memory import peak_memory
from manyheads.choose.mobile import compare_onnx, has_onnx
from manyheads.choose.results import Progress
from manyheads.choose.table import text_table
from manyheads.choose.timing import Timing, forward, interleaved
from manyheads.choose.units import show_bytes, show_rate, show_seconds
from manyheads.errors import require_extra
from manyheads.models.base import create_model

__all__ = ["measure_vision", "vision_text"]

_SIDE = 224
# Our name: timm's, and what our model is built with to be timm's to the letter.
_OF_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "poolformer_s12": ("poolformer_s12", {"head_norm": "timm"}),
    "volo_d1": ("volo_d1_224", {}),
    "efficientformer_l1": ("efficientformer_l1", {}),
}
_TWO_SIZES: dict[str, dict[str, Any]] = {
    "soft_tiny": {"max_landmarks": 7},
    "mobilevig_ti": {},
    "dualtoken_vit_small": {},
}
# Of the largest output; folding reorders sums of float32.
_EQUAL = 1e-3


def measure_vision(*, quick: bool, seed: int, progress: Progress) -> dict[str, Any]:
    """Time everything; returns plain JSON types.

    Args:
        quick: one image, three rounds, small images for ONNX Runtime: to see that it runs.
        seed: of weights and images.
        progress: told the share done and what is going on.

    Raises:
        MissingExtraError: timm is not installed.
        ValueError: two forms of a model give different outputs.
    """
    require_extra("timm", "vision", "manyheads bench --vision")
    repeats, batches = (3, (1,)) if quick else (15, (1, 8))
    steps = len(batches) * (len(_OF_TIMM) + 1) + 2
    done = 0

    def tell(text: str) -> None:
        progress(done / steps, text)

    rows: list[dict[str, Any]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, (of_timm, changes) in _OF_TIMM.items():
            models = _against_timm(name, of_timm, changes)
            for batch in batches:
                tell(f"{name}, batch {batch}")
                rows += _timed(models, name, batch, repeats)
                done += 1
        models = _against_plain("transnext_tiny")
        plain = []
        for batch in batches:
            tell(f"transnext_tiny, batch {batch}")
            plain += _timed(models, "transnext_tiny", batch, repeats, memory=True)
            done += 1
        tell("224 and 448 px")
        sizes = [_two_sizes(n, c, repeats) for n, c in _TWO_SIZES.items()]
        done += 1
        onnx = None
        if has_onnx():
            onnx = compare_onnx(tell, side=64 if quick else _SIDE, repeats=repeats)
    return {"timm": rows, "plain": plain, "sizes": sizes, "onnx": onnx}


def _against_timm(name: str, of_timm: str, changes: dict[str, Any]) -> dict[str, nn.Module]:
    import timm

    theirs = timm.create_model(of_timm).eval()
    _shake(theirs)
    ours = create_model(name, weights=theirs.state_dict(), **changes).eval()
    return {"timm": theirs, "eager": ours, "fused": ours.fuse()}


def _against_plain(name: str) -> dict[str, nn.Module]:
    ours = create_model(name).eval()
    _shake(ours)
    plain = create_model(name, implementation="reference").eval()
    plain.load_state_dict(ours.state_dict())
    return {"plain": plain, "eager": ours, "fused": ours.fuse()}


@torch.no_grad()
def _shake(model: nn.Module) -> None:
    """Move layer scales and the like off their first values, where branches hardly count."""
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))


def _timed(
    models: dict[str, nn.Module], name: str, batch: int, repeats: int, *, memory: bool = False
) -> list[dict[str, Any]]:
    """Return a row for each form of a model; the first is what the others are compared with."""
    x = torch.randn(batch, 3, _SIDE, _SIDE)
    calls = {form: forward(model, x) for form, model in models.items()}
    first = next(iter(models))
    expected = calls[first]()
    differences = {form: _difference(name, form, call(), expected) for form, call in calls.items()}
    timings = interleaved(calls, repeats=repeats)
    return [
        {
            "model": name,
            "form": form,
            "batch": batch,
            "side": _SIDE,
            "difference": differences[form],
            "peak_bytes": peak_memory(calls[form]).peak_bytes if memory else None,
            **_figures(timing),
            "times_faster": timings[first].median / timing.median,
        }
        for form, timing in timings.items()
    ]


def _difference(name: str, form: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < _EQUAL:
        raise ValueError(f"{name}, {form}: outputs differ by {difference:.1e} of the largest")
    return difference


def _two_sizes(name: str, changes: dict[str, Any], repeats: int) -> dict[str, Any]:
    model = create_model(name, **changes).eval().fuse()
    calls: dict[str, Callable[[], Any]] = {
        str(side): forward(model, torch.randn(1, 3, side, side)) for side in (_SIDE, 2 * _SIDE)
    }
    small, large = interleaved(calls, repeats=repeats).values()
    return {
        "model": name,
        "options": changes,
        str(_SIDE): _figures(small),
        str(2 * _SIDE): _figures(large),
        "growth": large.median / small.median,
    }


def _figures(timing: Timing) -> dict[str, Any]:
    return {k: v for k, v in timing.to_dict().items() if k in ("median", "lower", "upper")}


def vision_text(record: dict[str, Any]) -> str:
    """Return the record as tables."""
    m, found = record["machine"], record["vision"]
    parts = [
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, matrix products "
        f"{show_rate(m['matmul_flops'])}\n{_SIDE} px, float32; {record['command']}; "
        f"{show_seconds(record['wall_seconds'])}"
    ]
    if record["quick"]:
        parts.append("quick: one image and few rounds, to see that it runs")
    for key, title, base in (
        ("timm", "forward, against timm in PyTorch", "faster than timm"),
        ("plain", "forward, against unfolded neighbours", "faster than plain"),
    ):
        rows = [
            [
                r["model"],
                r["form"],
                str(r["batch"]),
                show_seconds(r["median"]),
                f"{r['times_faster']:.2f}x",
                show_bytes(r["peak_bytes"]),
            ]
            for r in found[key]
        ]
        header = ["model", "form", "batch", "time", base, "peak memory"]
        parts.append(f"{title}\n{text_table(header, rows, left=2)}")
    small, large = str(_SIDE), str(2 * _SIDE)
    rows = [
        [r["model"], *(show_seconds(r[s]["median"]) for s in (small, large)), f"{r['growth']:.2f}x"]
        for r in found["sizes"]
    ]
    header = ["model", f"{small} px", f"{large} px", "grows (4 is linear)"]
    parts.append(f"time by size of the image\n{text_table(header, rows)}")
    parts.append(_onnx_text(found["onnx"]))
    return "\n\n".join(parts)


def _onnx_text(found: dict[str, Any] | None) -> str:
    if found is None:
        return "ONNX Runtime is not installed (extra vision): not measured"
    seconds = {n: t["median"] for n, t in found["seconds"].items()}
    rows = [
        [
            r["model"],
            r["reference"],
            show_seconds(seconds[r["model"]]),
            f"{r['here']:.2f}x",
            ", ".join(f"{v:.2f}x on {phone}" for phone, v in r["phones"].items()) or "-",
        ]
        for r in found["rows"]
    ]
    header = ["model", "against", "time", "of its time, here", "as published"]
    return f"ONNX Runtime, one image\n{text_table(header, rows, left=2)}"
