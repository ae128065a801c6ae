"""IA-RED²: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from manyheads.choose.flops import count_flops
from manyheads.choose.machine import set_threads
from manyheads.choose.timing import forward, interleaved
from manyheads.models.base import create_model
from manyheads.models.vision.ia_red2 import IARed2, IARed2Config
from manyheads.papers.base import Check, Claim, Measurement, Paper
from manyheads.train.policy import dropping_loss

__all__ = ["PAPER", "Needles", "fit_needles", "judge", "measure", "needles", "speed"]

# Shares of 197 tokens behind each interpreter, as the paper's schedules have them.
_KEPT = (0.72, 0.5, 0.36)
_SIDE, _PATCH, _TELLING = 4, 8, 3
_DENSE_STEPS, _POLICY_STEPS, _BATCH = 300, 250, 64

Progress = Callable[[str], None]


class Needles(NamedTuple):
    """Images whose label three of 16 patches tell.

    Attributes:
        images: (B, 3, 32, 32).
        labels: (B,): how many of the telling patches are of the second kind, 0 to 3.
        telling: bool (B, 16).
    """

    images: Tensor
    labels: Tensor
    telling: Tensor


def needles(count: int, generator: torch.Generator) -> Needles:
    """Draw images: three patches of two known kinds at random places, the others noise."""
    patches = _SIDE * _SIDE
    kinds = torch.randn(2, 3, _PATCH, _PATCH, generator=torch.Generator().manual_seed(9))
    places = torch.rand(count, patches, generator=generator).argsort(1)[:, :_TELLING]
    signs = torch.randint(0, 2, (count, _TELLING), generator=generator)
    shape = (count, patches, 3, _PATCH, _PATCH)
    x = torch.randn(shape, generator=generator)
    noise = torch.randn(count, _TELLING, *shape[2:], generator=generator)
    x[torch.arange(count)[:, None], places] = 1.5 * kinds[signs] + 0.3 * noise
    grid = x.unflatten(1, (_SIDE, _SIDE)).permute(0, 3, 1, 4, 2, 5)
    telling = torch.zeros(count, patches, dtype=torch.bool).scatter(1, places, True)
    return Needles(grid.flatten(4, 5).flatten(2, 3), signs.sum(1), telling)


def fit_needles(
    progress: Progress,
    *,
    dense_steps: int = _DENSE_STEPS,
    policy_steps: int = _POLICY_STEPS,
    seed: int = 0,
) -> IARed2:
    """Train a small model: the backbone alone, then the interpreters one after the other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = IARed2Config(
            groups=(1, 1), embed_dim=48, num_heads=3, interpreter_heads=3, patch_size=_PATCH,
            image_size=_SIDE * _PATCH, num_classes=_TELLING + 1,
        )  # fmt: skip
        model = IARed2(config).unfreeze_interpreters()
    backbone = [p for n, p in model.named_parameters() if not n.startswith("interpreters")]
    rates = [
        {"params": backbone, "lr": 1e-3},
        {"params": model.interpreters.parameters(), "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(rates, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    steps = dense_steps + len(model.depths) * policy_steps
    # Policies settle as the rates fall: a draw at the last step can still cost an answer.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (steps - step) / max(steps - dense_steps, 1))
    )
    for step in range(steps):
        stage = (step - dense_steps) // policy_steps if policy_steps else -1
        if step % 100 == 0:
            progress(f"needles: step {step}, interpreters that learn: {max(stage + 1, 0)}")
        batch = needles(_BATCH, generator)
        optimizer.zero_grad()
        dropping_loss(
            model, batch.images, batch.labels, last=max(stage, 0), dense=stage < 0,
            generator=generator,
        ).backward()  # fmt: skip
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def judge(model: IARed2, *, count: int = 1000) -> dict[str, float]:
    """Return accuracies (dense, dropped, random), what the first interpreter keeps, and the cost.

    "random" keeps as many patches of each image as the interpreters do, any of them.
    """
    generator = torch.Generator().manual_seed(777)
    x, labels, telling = needles(count, generator)
    out = model.look(x)
    order = torch.rand(x.shape[0], telling.shape[1], generator=generator).argsort(1).argsort(1)
    rank = torch.cat((order.new_full((count, 1), -1), order), 1)
    by_chance = [rank < p[:, 1:].sum(1, keepdim=True) for p in out.policies]
    answers = {
        "dense": model.look(x, policies=[torch.ones_like(p) for p in out.policies]),
        "dropped": out,
        "random": model.look(x, policies=by_chance),
    }
    kept = out.policies[0][:, 1:]
    return {
        n: float((a.logits.argmax(1) == labels).double().mean()) for n, a in answers.items()
    } | {
        "telling_kept": float(kept[telling].double().mean()),
        "others_kept": float(kept[~telling].double().mean()),
        "cost": float(out.cost.mean()),
    }


def speed(
    progress: Progress, *, kept: Sequence[float] = _KEPT, repeats: int = 9
) -> dict[str, float]:
    """Return seconds and multiply-adds of DeiT-S on one image, dense and with policies given."""
    progress("DeiT-S on one image, whole and dropping")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model("ia_red2_deit_small").eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    places = torch.rand(1, 197, generator=torch.Generator().manual_seed(1))
    places[:, 0] = -1
    ranks = places.argsort(1).argsort(1)
    policies = [ranks < round(197 * share) for share in kept]

    whole, dropping = _Plain(model), _Given(model, policies)
    with torch.no_grad():
        times = interleaved({"dense": forward(whole, x), "dropped": forward(dropping, x)},
                            repeats=repeats)  # fmt: skip
    costs = {n: count_flops(m, x).total / 2 for n, m in (("dense", whole), ("dropped", dropping))}
    return {f"{n}_seconds": t.median for n, t in times.items()} | {
        f"{n}_macs": c for n, c in costs.items()
    }


class _Plain(nn.Module):
    """The backbone without interpreters."""

    def __init__(self, model: IARed2) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = self.model.embed(x)
        for block in self.model.blocks:
            tokens = block(tokens)
        return self.model.read_out(tokens)[1]


class _Given(nn.Module):
    """The whole model, interpreters included, with policies that do not depend on the weights."""

    def __init__(self, model: IARed2, policies: list[Tensor]) -> None:
        super().__init__()
        self.model, self.policies = model, policies

    def forward(self, x: Tensor) -> Tensor:
        return self.model.look(x, policies=self.policies).logits


def measure(progress: Progress) -> Measurement:
    """Train interpreters on images of known content, and time DeiT-S with tokens gone."""
    with set_threads(1):  # the model is so small that threads would wait for each other
        found = judge(fit_needles(progress))
    timed = speed(progress)
    faster = timed["dense_seconds"] / timed["dropped_seconds"]
    cheaper = timed["dense_macs"] / timed["dropped_macs"]
    params = create_model("ia_red2_deit_small", device="meta").num_parameters()
    lost, chance = found["dense"] - found["dropped"], found["dense"] - found["random"]
    kept = ", ".join(f"{k:.0%}" for k in _KEPT)
    return Measurement(
        checks=(
            Check(
                what="accuracy lost by dropping, images whose label three of 16 patches tell",
                claimed="less than 0.7 points",
                measured=100 * lost,
                unit="points",
                direction=lost < chance,
                size=lost < 0.007,
                bound=f"below 0.7; as many patches dropped by chance: {100 * chance:.1f}",
            ),
            Check(
                what="share of the telling patches that the first interpreter keeps",
                claimed="what the model needs is kept",
                measured=found["telling_kept"],
                direction=found["telling_kept"] > found["others_kept"],
                size=found["telling_kept"] > 0.9,
                bound="above 0.9",
            ),
            Check(
                what="share of the other patches that it keeps",
                claimed="redundant patches are dropped",
                measured=found["others_kept"],
                direction=found["others_kept"] < found["telling_kept"],
                size=found["others_kept"] < 0.5,
                bound="below 0.5",
            ),
            Check(
                what=f"speed of DeiT-S on one image with {kept} of the tokens over the dense one",
                claimed="up to 1.4 times as fast",
                measured=faster,
                unit="x",
                direction=faster > 1,
                size=faster >= 1.3,
                bound="at least 1.3",
            ),
            Check(
                what="that speed over the ratio of multiply-adds",
                claimed="what is not computed is not paid",
                measured=faster / cheaper,
                unit="x",
                direction=faster > 0.5 * cheaper,
                size=faster >= 0.85 * cheaper,
                bound=f"at least 0.85; ratio of multiply-adds {cheaper:.2f}",
            ),
            Check(
                what="parameters of DeiT-S with three interpreters",
                claimed="22.05 million and 3 x 443,520",
                measured=params,
                direction=True,
                size=params == 23_381_224,
                bound="23,381,224",
            ),
        ),
        figures={"needles": found, "deit_small": timed},
        notes=(
            "no training code was released: reward and curriculum follow the paper's equations, "
            "the forward pass the released interpretation tool",
            "accuracies on ImageNet need its images and were not re-measured; the policies that "
            "DeiT-S is timed with are given, not learnt",
        ),
    )


PAPER = Paper(
    slug="ia-red2",
    title="IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers",
    arxiv="2106.12620",
    summary=(
        "An interpreter in front of every group of blocks scores the patches against the class "
        "token, and those that tell nothing are gone for the rest of the model. It learns by "
        "policy gradients, fits any vision transformer with a class token, and its scores are a "
        "picture of what the model looks at."
    ),
    implements=(
        "manyheads.models.vision.ia_red2.Interpreter",
        "manyheads.models.vision.ia_red2.IARed2",
        "manyheads.models.vision.ia_red2.IARed2Video",
        "manyheads.models.vision.ia_red2.wrap",
        "manyheads.train.policy.dropping_loss",
    ),
    recipe="manyheads train ia-red2 --data images",
    claim=Claim(
        statement=(
            "Vision transformers run up to 1.4 times as fast, losing less than 0.7 points of "
            "accuracy, once learnt interpreters drop the patches that are redundant."
        ),
        measure=measure,
    ),
)
