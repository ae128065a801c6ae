"""URPE attention: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from manyheads.attention.urpe import URPEAttention, URPEConfig, urpe, urpe_reference
from manyheads.data.synthetic import PositionConfig, TaskBatches, get_task
from manyheads.layers.relative import parameter_groups
from manyheads.models.language.urpe import URPEEncoder, URPEEncoderConfig
from manyheads.papers.base import Check, Claim, Measurement, Paper
from manyheads.papers.small import fit, held_out_accuracy, token_loss

__all__ = ["PAPER", "constant_input_spread", "measure", "task_accuracy"]

_BATCH, _RATE, _TABLE_RATE = 64, 3e-3, 1e-2
_SEEDS = (0, 1)
_STEPS = {"pi": 480, "etp": 800}
_TASKS = {
    "pi": PositionConfig(words=50, length=32),
    "etp": PositionConfig(words=50, length=16),
}

Kind = Literal["unique", "none"]
Progress = Callable[[str], None]


def constant_input_spread(*, multiplier: bool) -> float:
    """Return the largest difference between output rows of a layer that reads equal tokens.

    A bidirectional layer with random weights and bias; ``multiplier``: random C, else C = 1.
    """
    with _seeded(0):
        layer = URPEAttention(URPEConfig(embed_dim=64, num_heads=4, is_causal=False))
        assert layer.bias is not None
        assert layer.multiplier is not None
        with torch.no_grad():
            layer.bias.weight.normal_()
            if multiplier:
                layer.multiplier.weight.normal_()
            out = layer(torch.randn(1, 1, 64).expand(1, 100, 64))
    return float((out - out[:, :1]).abs().max())


def task_accuracy(
    name: Literal["pi", "etp"],
    kind: Kind,
    *,
    seed: int = 0,
    steps: int | None = None,
    progress: Progress = lambda text: None,
) -> float:
    """Train a small encoder on a position task; return its accuracy on held-out sequences.

    Args:
        name: "pi" or "etp".
        kind: of the multiplier: "unique" (URPE) or "none" (a relative bias alone).
        seed: of the weights.
        steps: of training, those of the claim unless given.
        progress: told what is going on.
    """
    task, sizes = get_task(name), _TASKS[name]
    steps = _STEPS[name] if steps is None else steps
    with _seeded(seed):
        model = URPEEncoder(
            URPEEncoderConfig(
                vocab_size=sizes.num_tokens,
                embed_dim=64,
                num_layers=2,
                num_heads=4,
                mlp_width=128,
                max_length=sizes.length,
                multiplier=kind,
                tie_embeddings=False,
                init_std=0.1,
            )
        )
    weights, tables = parameter_groups(model, weight_decay=0)
    # Tables start at 1 and nearly 0 and have far to go: they learn faster than the weights.
    groups = [weights | {"lr": _RATE}, tables | {"lr": _TABLE_RATE}]
    kind_of = "with C" if kind != "none" else "bias alone"
    fit(
        model,
        TaskBatches(task, sizes, batch_size=_BATCH),
        token_loss,
        torch.optim.Adam(groups),
        steps=steps,
        progress=lambda text: progress(f"{name}, {kind_of}: {text}"),
    )
    return held_out_accuracy(model, task, sizes, samples=256)


def measure(progress: Progress) -> Measurement:
    """Equal tokens, the two position tasks with and without C, and blocks against the matrix."""
    progress("equal tokens")
    alone, spread = (constant_input_spread(multiplier=m) for m in (False, True))
    accuracy = {
        name: {
            kind: [task_accuracy(name, kind, seed=s, progress=progress) for s in _SEEDS]
            for kind in ("unique", "none")
        }
        for name in ("pi", "etp")
    }
    progress("blocks against the matrix")
    error = _block_error()
    checks = [
        Check(
            what="equal tokens through a relative bias alone, largest difference of places",
            claimed="none: rows of a softmax sum to 1",
            measured=alone,
            direction=alone < spread,
            size=alone <= 1e-6,
            bound="at most 1e-6",
        ),
        Check(
            what="equal tokens with C, largest difference of places",
            claimed="places differ",
            measured=spread,
            direction=spread > alone,
            size=spread > 1e-2,
            bound="above 1e-2",
        ),
    ]
    for name, what, least in (
        ("pi", "position identification, 32 tokens", 0.95),
        ("etp", "even token prediction, 16 tokens", 0.9),
    ):
        own, other = min(accuracy[name]["unique"]), max(accuracy[name]["none"])
        checks.append(
            Check(
                what=f"{what}: accuracy with C, the worst of {len(_SEEDS)} seeds",
                claimed="about 100 %, a relative bias alone fails",
                measured=own,
                direction=own > other + 0.2,
                size=own > least,
                bound=f"above {least} and 0.2 above the best of the bias alone, {other:.3f}",
            )
        )
    checks.append(
        Check(
            what="blocks of rows against the whole matrix, relative error in float32",
            claimed="the same function",
            measured=error,
            direction=error < 1e-3,
            size=error <= 1e-5,
            bound="at most 1e-5",
        )
    )
    return Measurement(
        checks=tuple(checks),
        figures={
            "constant_input_spread": {"bias alone": alone, "with C": spread},
            "accuracy": accuracy,
            "tasks": {n: c.to_dict() | {"steps": _STEPS[n]} for n, c in _TASKS.items()},
            "batch": _BATCH,
        },
        notes=(
            "the second half of even token prediction is one constant token: 0.5 is what a model "
            "reaches that knows no more than that token",
            "two layers of width 64; the published runs have three of 768 and 40,000 updates",
            "published language and graph results were not re-measured",
        ),
    )


def _block_error() -> float:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1500, 32, generator=generator) for _ in range(3))
    b, c = (torch.randn(4, 2999, generator=generator) for _ in range(2))
    out = urpe(q, k, v, bias=b, multiplier=c)
    whole = urpe_reference(q, k, v, bias=b, multiplier=c)
    return float((out - whole).square().mean().sqrt() / whole.square().mean().sqrt())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch for a block and leave its generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


PAPER = Paper(
    slug="urpe",
    title="Your Transformer May Not be as Powerful as You Expect",
    arxiv="2205.13401",
    summary=(
        "A relative position bias inside the softmax cannot express some functions of position, "
        "because rows of a softmax sum to 1: equal tokens stay equal. URPE multiplies the softmax "
        "by a learned matrix C of the distance, which repairs that with a few numbers a head."
    ),
    implements=(
        "manyheads.attention.urpe",
        "manyheads.attention.URPEAttention",
        "manyheads.attention.add_urpe",
        "manyheads.layers.relative.RelativeTable",
        "manyheads.models.language.urpe.URPEEncoder",
    ),
    recipe="manyheads train urpe-tasks",
    claim=Claim(
        statement=(
            "A Transformer whose only positions are a relative bias inside the softmax fails on "
            "tasks that need to know the place of a token; with a factor behind it, it solves them."
        ),
        measure=measure,
    ),
)
