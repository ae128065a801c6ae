"""Sparse-linear attention: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import SLAAttention, SLAConfig, sla, sla_parts, softmax, softmax_weights
from manyheads.choose.flop_formulas import attention_flops
from manyheads.choose.flops import count_flops
from manyheads.choose.memory import peak_memory
from manyheads.choose.timing import forward, forward_backward, interleaved
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER", "clustered_tokens", "fitted_error", "measure", "stable_ranks"]

_VIDEO = 32_760  # tokens of 81 frames at 480p in Wan2.1, with heads of 128
_LONG = 16_384  # dense attention at the full length takes minutes
_BLOCK, _TOKENS, _DIM, _STEPS, _RATE = 16, 256, 32, 300, 3e-3
_BRANCHES = ("sparse", "main", "sla1", "paper")

Progress = Callable[[str], None]


def clustered_tokens(batch: int, generator: torch.Generator) -> Tensor:
    """Draw (B, 256, 32) tokens: runs of one of eight centres, each of them with noise."""
    centres = torch.randn(8, _DIM, generator=torch.Generator().manual_seed(5))
    runs = torch.randint(8, (batch, _TOKENS // _BLOCK), generator=generator)
    noise = torch.randn(batch, _TOKENS, _DIM, generator=generator)
    return centres[runs].repeat_interleave(_BLOCK, 1) + 0.7 * noise


def fitted_error(
    branch: str, *, steps: int = _STEPS, progress: Progress = lambda text: None
) -> float:
    """Fine-tune a layer towards the full attention that it started as; return what is left.

    Args:
        branch: a variant of ``sla``, or "sparse": the critical blocks alone.
        steps: of fine-tuning all weights, on new tokens each.
        progress: told what is going on.

    Returns:
        The squared error over the variance of the teacher's outputs, on tokens held out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embed_dim": _DIM, "num_heads": 2, "rotary_theta": None}
        variant = "main" if branch == "sparse" else branch
        blocks: dict[str, Any] = {"block_q": _BLOCK, "block_k": _BLOCK, "variant": variant}
        teacher = SLAAttention(SLAConfig(**sizes, **blocks, topk=1.0)).requires_grad_(False)
        with torch.no_grad():  # as peaked as trained attention: drawn alone, all weights are alike
            teacher.q_proj.weight.mul_(2)
            teacher.k_proj.weight.mul_(2)
        student = SLAAttention(SLAConfig(**sizes, **blocks, topk=0.125))
        student.load_state_dict(teacher.state_dict())
    if branch == "sparse":
        student.attention.requires_grad_(False)
    learned = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=_RATE)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if step % 100 == 0:
            progress(f"fine-tuning, {branch}: step {step} of {steps}")
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - step / steps)
        x = clustered_tokens(8, generator)
        loss = F.mse_loss(student(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    with torch.no_grad():
        x = clustered_tokens(64, torch.Generator().manual_seed(1))
        expected = teacher(x)
        return float((student(x) - expected).square().mean() / expected.var())


def stable_ranks(share: float = 0.08) -> tuple[float, float]:
    """Return the stable ranks of attention weights, whole and without their largest ``share``.

    The stable rank is the squared Frobenius norm over the squared spectral norm. Queries and keys
    are clustered as in trained attention, one head of 64 over 1,024 tokens.
    """
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(64, 64, generator=generator)
    q, k = (
        centres[torch.randint(64, (1024,), generator=generator)]
        + 0.5 * torch.randn(1024, 64, generator=generator)
        for _ in range(2)
    )
    weights = softmax_weights(q[None, None], k[None, None])[0, 0].double()
    cut = weights.flatten().kthvalue(round(weights.numel() * (1 - share))).values
    rest = weights.masked_fill(weights > cut, 0)
    whole, left = (
        float(w.square().sum() / torch.linalg.matrix_norm(w, 2).square()) for w in (weights, rest)
    )
    return whole, left


def measure(progress: Progress) -> Measurement:
    """Measure exactness, FLOPs, time, memory, fine-tuning against sparse alone, and ranks."""
    progress("all blocks critical against full attention")
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 1000, 64, generator=generator)
    zero = torch.zeros(64, 64)
    error = float((sla(q, k, v, zero, zero[0], topk=1.0) - softmax(q, k, v)).abs().max())

    progress(f"FLOPs at {_VIDEO:,} tokens")
    shape = (1, 1, _VIDEO, 128)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    full = attention_flops(shape, shape, shape, is_causal=False)
    with torch.no_grad():
        sparse = count_flops(sla, q, k, v).total
        whole = count_flops(sla, q, k, v, torch.eye(128)).total

    progress(f"time and memory at {_LONG:,} tokens")
    a, b, c = (
        torch.randn(1, 1, _LONG, 128, generator=generator).requires_grad_() for _ in range(3)
    )
    weight = torch.randn(128, 128, generator=generator).requires_grad_()
    medians: dict[str, dict[str, float]] = {}
    for name, call in (("forward", forward), ("both", forward_backward)):
        times = interleaved(
            {
                "sparse": call(sla, a, b, c),
                "whole": call(sla, a, b, c, weight),
                "softmax": call(softmax, a, b, c),
            },
            repeats=3,
        )
        medians[name] = {n: t.median for n, t in times.items()}
    medians["backward"] = {n: t - medians["forward"][n] for n, t in medians["both"].items()}
    ratios = {
        name: {n: medians[name]["softmax"] / medians[name][n] for n in ("sparse", "whole")}
        for name in ("forward", "backward")
    }
    largest = peak_memory(lambda: sla(a, b, c, weight).sum().backward()).largest_tensor_bytes / 4

    left = {branch: fitted_error(branch, progress=progress) for branch in _BRANCHES}
    untrained = fitted_error("sparse", steps=0)
    progress("ranks")
    ranks = stable_ranks()
    sparsity = sla_parts(q, k, v).sparsity
    checks = (
        Check(
            what="all blocks critical, projection zero: largest difference from full attention",
            claimed="the sparse branch is exact softmax attention",
            measured=error,
            direction=error < 1e-3,
            size=error <= 1e-5,
            bound="at most 1e-5",
        ),
        Check(
            what=f"FLOPs of softmax attention over those of the sparse branch, {_VIDEO:,} tokens",
            claimed="20 times fewer, 95 % sparsity",
            measured=full / sparse,
            unit="x",
            direction=sparse < full,
            size=full / sparse >= 19,
            bound=f"at least 19; {full / whole:.1f} with the linear branch",
        ),
        *(
            Check(
                what=f"time of softmax attention over the sparse branch's at {_LONG:,}, {name}",
                claimed=f"{least} times faster kernels on a GPU",
                measured=ratios[name]["sparse"],
                unit="x",
                direction=ratios[name]["sparse"] > 1,
                size=ratios[name]["sparse"] >= least,
                bound=f"at least {least}; {ratios[name]['whole']:.1f} with the linear branch",
            )
            for name, least in (("forward", 13.7), ("backward", 6.8))
        ),
        Check(
            what="largest tensor of forward and backward at 16,384 tokens over N x N",
            claimed="no N x N matrix",
            measured=largest / _LONG**2,
            direction=largest < _LONG**2,
            size=largest < _LONG**2 / 16,
            bound="below 1/16",
        ),
        Check(
            what="error of SLA after fine-tuning over that of its sparse branch alone",
            claimed="the linear branch makes up for what sparsity drops",
            measured=left["main"] / left["sparse"],
            unit="x",
            direction=left["main"] < left["sparse"],
            size=left["main"] < 0.9 * left["sparse"],
            bound=f"below 0.9; sparse alone leaves {left['sparse']:.3f}, {untrained:.3f} untrained",
        ),
        Check(
            what="stable rank of attention without its largest 8 % over that of the whole",
            claimed="what is left is of very low rank",
            measured=ranks[1] / ranks[0],
            unit="x",
            direction=ranks[1] < ranks[0],
            size=ranks[1] < 0.25 * ranks[0],
            bound="below 0.25",
        ),
    )
    return Measurement(
        checks=checks,
        figures={
            "flops": {"softmax": full, "sparse": sparse, "sla": whole},
            "sparsity": sparsity,
            "speed_over_softmax": ratios,
            "error_left": left | {"untrained sparse": untrained},
            "stable_rank": {"whole": ranks[0], "without its largest 8 %": ranks[1]},
            "fine_tuning": {"steps": _STEPS, "tokens": _TOKENS, "topk": 0.125, "block": _BLOCK},
        },
        notes=(
            "one layer learns to be the full attention that it started as, from clustered tokens; "
            "ranks are of clustered queries and keys, not of a trained model",
            "video quality and end-to-end time of Wan2.1 were not re-measured",
        ),
    )


PAPER = Paper(
    slug="sla",
    title="SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
    arxiv="2509.24006",
    summary=(
        "Softmax attention over the few key blocks that matter to a block of queries, linear "
        "attention through a learned projection for the rest. It takes the place of full "
        "attention in a video or image transformer, which is then fine-tuned for some thousand "
        "steps."
    ),
    implements=(
        "manyheads.attention.sla",
        "manyheads.attention.sla_parts",
        "manyheads.attention.SparseLinearAttention",
        "manyheads.attention.SLAAttention",
        "manyheads.attention.draw_block_map",
    ),
    recipe="manyheads train classify --mixers sla*4",
    claim=Claim(
        statement=(
            "With 5 % of the blocks computed exactly, attention costs 20 times fewer FLOPs and is "
            "many times faster forward and backward, and after fine-tuning it comes closer to full "
            "attention than its sparse part alone."
        ),
        measure=measure,
    ),
)
