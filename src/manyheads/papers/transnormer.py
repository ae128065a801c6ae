"""TransNormer: a norm in place of the denominator, and local attention before linear attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from manyheads.attention.diag import DiagAttention, DiagConfig
from manyheads.attention.norm import norm, norm_reference
from manyheads.attention.softmax import softmax
from manyheads.choose.timing import forward_backward, interleaved
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "gradient_at", "measure"]

_SCALES = tuple(10.0**-i for i in range(7))
_SHORT, _LONG = 1024, 4096


def gradient_at(scale: float, eps: float | None) -> tuple[float, float]:
    """Return the largest |dL/dS| for similarities S = scale · S0, and the bound c1 c2 / eps.

    O = S V is normalised by SimpleRMSNorm with ``eps``, or, with None, divided by the row sums of
    S as kernel attention does. L = (O · G).sum() with a fixed G; c1 and c2 are the largest norms
    of a row of G and of V. Float64.
    """
    generator = torch.Generator().manual_seed(0)
    positive = torch.rand(1, 1, 32, 32, generator=generator, dtype=torch.float64) + 0.1
    value, cotangent = torch.randn(2, 1, 1, 32, 64, generator=generator, dtype=torch.float64)
    similarity = (positive * scale).requires_grad_()
    if eps is None:
        out = similarity @ value / similarity.sum(-1, keepdim=True)
    else:
        # norm_reference(S, I, V) is SimpleRMSNorm(S Iᵀ V).
        eye = torch.eye(32, dtype=torch.float64)[None, None]
        out = norm_reference(similarity, eye, value, eps=eps)
    (grad,) = torch.autograd.grad((out * cotangent).sum(), similarity)
    bound = float(cotangent.norm(dim=-1).max() * value.norm(dim=-1).max()) / (eps or float("inf"))
    return float(grad.abs().max()), bound


def measure(progress: Callable[[str], None]) -> Measurement:
    """Gradients of weak similarities, time against length, and who sees whom."""
    progress("gradients")
    steep = {str(eps): [gradient_at(s, eps)[0] for s in _SCALES] for eps in (None, 1e-2, 1e-8)}
    growth = {eps: g[-1] / g[-2] for eps, g in steep.items()}
    _, bound = gradient_at(_SCALES[-1], 1e-8)
    checks = [
        Check(
            what="gradient of S V / rowsum(S), from S = 1e-5 S0 to 1e-6 S0",
            claimed="unbounded: grows as 1/s, 10x",
            measured=growth["None"],
            unit="x",
            direction=growth["None"] > 1,
            size=9 < growth["None"] < 11,
            bound="between 9 and 11",
        ),
        Check(
            what="the same with the norm, eps = 1e-2",
            claimed="bounded",
            measured=growth["0.01"],
            unit="x",
            direction=growth["0.01"] < growth["None"],
            size=growth["0.01"] < 1.2,
            bound="saturated: below 1.2",
        ),
        Check(
            what="the same with the norm and the released eps = 1e-8",
            claimed="bounded, by c1 c2 / eps",
            measured=growth["1e-08"],
            unit="x",
            direction=steep["1e-08"][-1] <= bound,
            size=growth["1e-08"] < 1.2,
            bound="saturated: below 1.2",
        ),
    ]

    progress("time against length")
    calls: dict[str, Callable[[], object]] = {}
    for length in (_SHORT, _LONG):
        inputs = _inputs(length)
        for name, fn in (("norm", norm), ("softmax", softmax)):
            calls[f"{name} {length}"] = forward_backward(fn, *inputs, is_causal=True)
    times = {k: t.median for k, t in interleaved(calls, repeats=5, budget_seconds=45).items()}
    ratio = {n: times[f"{n} {_LONG}"] / times[f"{n} {_SHORT}"] for n in ("norm", "softmax")}
    checks.append(
        Check(
            what=f"causal forward and backward, time({_LONG}) / time({_SHORT})",
            claimed="linear: 4x (softmax 16x)",
            measured=ratio["norm"],
            unit="x",
            direction=ratio["norm"] < ratio["softmax"],
            size=ratio["norm"] < 6,
            bound="below 6",
        )
    )

    progress("the causal form in chunks")
    q, k, v = _inputs(_LONG)
    with torch.no_grad():
        chunked = norm(q, k, v, is_causal=True)
        whole = norm(q, k, v, is_causal=True, implementation="parallel")
    error = float((chunked - whole).square().mean().sqrt() / whole.square().mean().sqrt())
    checks.append(
        Check(
            what="linear causal form against the quadratic one, relative error in float32",
            claimed="the same function",
            measured=error,
            direction=True,
            size=error < 2e-5,
            bound="below 2e-5",
        )
    )

    progress("locality")
    outside, inside = _reach()
    checks.append(
        Check(
            what="tokens outside its block that one token changes in a DiagAttention layer",
            claimed="none",
            measured=outside,
            unit=f"(and {inside} inside)",
            direction=outside == 0 and inside > 0,
            size=outside == 0,
            bound="none",
        )
    )
    figures = {
        "scales": list(_SCALES),
        "largest_gradient": {
            "divided by the row sum": steep["None"],
            "normalised, eps 1e-2": steep["0.01"],
            "normalised, eps 1e-8": steep["1e-08"],
        },
        "bound_at_eps_1e-8": bound,
        "seconds": times,
        "time_ratio": ratio,
    }
    notes = (
        f"With the released eps = 1e-8 the gradient still grows as 1/s at s = 1e-6: the bound "
        f"c1 c2 / eps = {bound:.1e} holds, but is {bound / steep['1e-08'][-1]:.0f} times what is "
        "measured there, so that it bounds nothing in practice. With eps = 1e-2 it does: "
        f"{steep['0.01'][-1]:.1e} against {steep['None'][-1]:.1e} for the divided form. "
        "NormAttention takes eps as an option.",
    )
    return Measurement(checks=tuple(checks), figures=figures, notes=notes)


def _inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = torch.randn(3, 1, 8, length, 64, generator=generator)
    return q, k, v


def _reach() -> tuple[int, int]:
    """Return how many tokens outside and inside its block token 100 changes, T1 and T2."""
    outside = inside = 0
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 256, 64, generator=generator)
    other = x.clone()
    other[:, 100] += 1
    for variant in ("t1", "t2"):
        for is_causal in (True, False):
            values = {"embed_dim": 64, "variant": variant, "is_causal": is_causal}
            layer = DiagAttention(DiagConfig.from_dict(values)).eval()
            with torch.no_grad():
                changed = (layer(x) != layer(other)).any(-1)[0]
            block = slice(100 if is_causal else 64, 128)
            inside += int(changed[block].sum())
            outside += int(changed.sum()) - int(changed[block].sum())
    return outside, inside


PAPER = Paper(
    slug="transnormer",
    title="The Devil in Linear Transformer",
    arxiv="2210.10340",
    summary=(
        "Linear attention has two faults: its denominator gives unbounded gradients, and its "
        "weights are spread over far tokens. TransNormer replaces the denominator by a norm over "
        "the output of all heads (NormAttention), and gives the first half of the layers "
        "attention inside blocks of 64 tokens (DiagAttention). Cost is linear in the length, and "
        "a decoder's state does not grow."
    ),
    implements=(
        "manyheads.attention.norm",
        "manyheads.attention.NormAttention",
        "manyheads.attention.diag",
        "manyheads.attention.DiagAttention",
        "manyheads.layers.lrpe.LRPE",
        "manyheads.models.language.transnormer.TransNormerLM",
        "manyheads.models.language.transnormer_encoder.TransNormerEncoder",
        "manyheads.models.language.transnormer_lra.TransNormerLRA",
    ),
    recipe="manyheads train lm --mixers diag*2,norm*2",
    claim=Claim(
        statement=(
            "A norm of the output in place of the denominator bounds the gradient of linear "
            "attention, at a cost linear in the length; block-local attention keeps the first "
            "layers from looking far."
        ),
        measure=measure,
    ),
)
