"""SOFT: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from manyheads.attention.soft import (
    SoftAttention,
    gaussian_attention,
    gaussian_kernel,
    newton_inverse,
    soft,
)
from manyheads.choose.memory import track_memory
from manyheads.choose.timing import forward, interleaved
from manyheads.models.base import create_model
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "kernel_errors", "measure", "peaks", "unconverged"]

_DIM, _HEADS, _LANDMARKS = 64, 2, 7
_SIDES = (28, 56, 112)

Progress = Callable[[str], None]


def _layer(side: int) -> SoftAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SoftAttention(_DIM, _HEADS, ratio=side // _LANDMARKS, conv_size=9).eval()


def _map(side: int) -> Tensor:
    return torch.randn(1, side, side, _DIM, generator=torch.Generator().manual_seed(0))


class _Exact(nn.Module):
    """The layer with the whole kernel, N x N, in place of landmarks."""

    def __init__(self, layer: SoftAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        query, value = (
            f(x).flatten(1, 2).unflatten(2, (_HEADS, -1)).transpose(1, 2)
            for f in (self.layer.query, self.layer.value)
        )
        distances = torch.cdist(query, query).square_()
        kernel = distances.mul_(-0.5 * query.shape[3] ** -0.5).exp_()
        return self.layer.proj((kernel @ value).transpose(1, 2).flatten(2))


def peaks() -> dict[str, list[int]]:
    """Return peak bytes of the layer and of the exact kernel, by the side of the map."""
    found: dict[str, list[int]] = {"soft": [], "exact": []}
    for side in (28, 56):
        layer = _layer(side)
        for name, module in (("soft", layer), ("exact", _Exact(layer))):
            with torch.no_grad(), track_memory() as memory:
                module(_map(side))
            found[name].append(memory.peak)
    return found


def kernel_errors() -> list[float]:
    """Return relative errors on a smooth map, with 1, 4 and 16 of 576 places as landmarks."""
    places = torch.linspace(0, 2, 24, dtype=torch.float64)
    y, x = torch.meshgrid(places, places, indexing="ij")
    grid = torch.stack((y.sin(), x.cos(), (x + y).sin(), (x * y).cos()), -1)[None, None]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 1, 576, 6, generator=generator, dtype=torch.float64)
    query, errors = grid.flatten(2, 3), []
    exact = gaussian_attention(query, value, scale=1.0)
    for step in (24, 12, 6):
        chosen = grid[:, :, step // 2 :: step, step // 2 :: step].flatten(2, 3)
        error = soft(query, chosen, value) - exact
        errors.append(float(error.norm() / exact.norm()))
    return errors


def unconverged() -> float:
    """Return the relative distance of 20 Newton steps from the inverse, landmarks alike."""
    generator = torch.Generator().manual_seed(0)
    points = 0.05 * torch.randn(1, 49, 32, generator=generator, dtype=torch.float64)
    gram = gaussian_kernel(points, points)
    exact = torch.linalg.inv(gram + 0.01 * torch.eye(49, dtype=torch.float64))
    return float((newton_inverse(gram) - exact).norm() / exact.norm())


def measure(progress: Progress) -> Measurement:
    """Measure growth of time and memory, of the layer and the model, and the approximation."""
    times: dict[str, list[float]] = {"soft": [], "exact": []}
    with torch.no_grad():
        for side in _SIDES:
            progress(f"layer at {side} x {side} places")
            layer = _layer(side)
            calls = {"soft": forward(layer, _map(side))}
            if side < _SIDES[-1]:  # the whole kernel of 12,544 places holds 1.3 GB
                calls["exact"] = forward(_Exact(layer), _map(side))
            for name, timing in interleaved(calls, repeats=7).items():
                times[name].append(timing.median)
        sizes = _model_times(progress)
    progress("memory and errors")
    layer_growth = times["soft"][2] / times["soft"][1]
    exact_growth = times["exact"][1] / times["exact"][0]
    memory = {name: p[1] / p[0] for name, p in peaks().items()}
    model = {name: t[1] / t[0] for name, t in sizes.items()}
    errors, far = kernel_errors(), unconverged()
    params = create_model("soft_tiny", device="meta").num_parameters()
    return Measurement(
        checks=(
            Check(
                what="time of a layer at 112 x 112 places over 56 x 56, 49 landmarks",
                claimed="linear in the number of tokens (4)",
                measured=layer_growth,
                unit="x",
                direction=layer_growth < exact_growth,
                size=layer_growth < 5.5,
                bound=f"below 5.5; the whole kernel, 56 over 28: {exact_growth:.1f}",
            ),
            Check(
                what="peak memory of a layer at 56 x 56 places over 28 x 28",
                claimed="linear (4)",
                measured=memory["soft"],
                unit="x",
                direction=memory["soft"] < memory["exact"],
                size=memory["soft"] < 4.5,
                bound=f"below 4.5; the whole kernel {memory['exact']:.1f}",
            ),
            Check(
                what="time of SOFT-Tiny at 448 px over 224 px, max_landmarks=7",
                claimed="linear (4)",
                measured=model["seven"],
                unit="x",
                direction=model["seven"] < model["official"],
                size=model["seven"] < 4.6,
                bound=f"below 4.6; with the official landmarks {model['official']:.1f}",
            ),
            Check(
                what="error of the kernel with 16 landmarks over that with 4, smooth map",
                claimed="landmarks approximate the kernel",
                measured=errors[2] / errors[1],
                unit="x",
                direction=errors[2] < errors[1] < errors[0],
                size=errors[2] < 0.5 * errors[1],
                bound="below 0.5; errors " + ", ".join(f"{e:.3f}" for e in errors),
            ),
            Check(
                what="parameters of SOFT-Tiny",
                claimed="13 million",
                measured=params,
                direction=True,
                size=params == 13_069_056,
                bound="13,069,056 of the official code",
            ),
        ),
        figures={"layer_seconds": times, "model_seconds": sizes, "unconverged": far},
        notes=(
            "the released ratios give 49 landmarks at 224 px and 196 at 448 px, whose inverse "
            "costs 64 times as much: linear up to 224 px alone, beyond it with max_landmarks",
            f"20 Newton steps on landmarks that lie close are {far:.0%} of the norm away from the "
            "inverse: the truncation is part of the model",
            "published accuracies need ImageNet and were not re-measured",
        ),
    )


def _model_times(progress: Progress) -> dict[str, list[float]]:
    found = {}
    for name, limit in (("official", None), ("seven", 7)):
        progress(f"SOFT-Tiny at 224 and 448 px, landmarks: {name}")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = create_model("soft_tiny", max_landmarks=limit).eval().fuse()
            calls = {str(s): forward(model, torch.randn(1, 3, s, s)) for s in (224, 448)}
        found[name] = [t.median for t in interleaved(calls, repeats=5).values()]
    return found


PAPER = Paper(
    slug="soft",
    title="Softmax-free Linear Transformers",
    arxiv="2207.03341",
    summary=(
        "Vision attention with a Gaussian kernel in place of the softmax, approximated through a "
        "small grid of landmarks whose inverse is found by Newton steps. Cost is linear in the "
        "number of places while the number of landmarks is fixed; nothing of N x N is made."
    ),
    implements=(
        "manyheads.attention.soft.soft",
        "manyheads.attention.soft.SoftAttention",
        "manyheads.models.vision.soft.SOFT",
    ),
    recipe="manyheads train vision --model soft_tiny --data images",
    claim=Claim(
        statement=(
            "Attention without a softmax costs linear time and memory in the number of tokens, and "
            "reaches a better trade of accuracy for cost than other vision transformers."
        ),
        measure=measure,
    ),
)
