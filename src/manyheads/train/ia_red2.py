"""Train IA-RED²: a vision transformer learns which patches it can drop, group by group.

B batch, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from manyheads.data.images import ImageSplit
from manyheads.models.vision.ia_red2 import Dropping
from manyheads.train.launch import launch
from manyheads.train.loop import Batches
from manyheads.train.options import VisionOptions
from manyheads.train.policy import dropping_loss
from manyheads.train.stop import StopRequest
from manyheads.train.vision import Prepared, Procedure, accuracy, prepare
from manyheads.train.vision import train as train_vision
from manyheads.train.vision_data import Images

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["IARed2Options", "run"]

_SMALL = (
    '{"groups": [1, 1, 1], "embed_dim": 48, "num_heads": 3, "interpreter_heads": 3, '
    '"patch_size": 4}'
)


@dataclass(frozen=True, kw_only=True, slots=True)
class IARed2Options(VisionOptions):
    """Train a vision transformer that drops the patches it does not need.

    Attributes:
        model: a model with interpreters by name.
        dense_share: share of the steps, at the beginning, that the backbone learns alone, without
            dropping; with weights of a trained one, 0 will do.
        penalties: price of a wrong answer in each stage of the curriculum; the last one holds for
            stages beyond. Stage k trains the interpreters 1 to k.
        explore: share of decisions that are drawn against the score.
        policy_weight: of the policy gradient beside the cross entropy.
        mixup, cutmix: not here, because a mixed answer is neither right nor wrong.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"steps": 120, "batch_size": 32, "eval_every": 60},
    }
    recipe: ClassVar[str] = "ia-red2"

    model: str = "ia_red2_deit_small"
    steps: int = 3000
    learning_rate: float = 2e-3
    dense_share: float = 0.4
    penalties: tuple[float, ...] = field(default=(3.0, 5.0, 8.0))
    explore: float = 0.2
    policy_weight: float = 0.05

    def __post_init__(self) -> None:
        VisionOptions.__post_init__(self)
        if not 0 <= self.dense_share < 1:
            raise ValueError(f"dense_share is {self.dense_share}: give a share from 0 to below 1")
        if not self.penalties or min(self.penalties) < 0:
            raise ValueError(f"penalties {self.penalties}: give one or more, none below 0")
        if not 0 <= self.explore <= 0.5:
            raise ValueError(f"explore is {self.explore}: give a share from 0 to 0.5")
        if self.mixup or self.cutmix:
            raise ValueError("mixup and cutmix must be 0: mixed answers are not right or wrong")

    def resolved(self) -> Self:
        """Return a copy with the small model for small images, and the rest filled in."""
        small = self.model_options is None and not self.weights and (self.image_size or 32) <= 64
        if not small or self.model != "ia_red2_deit_small":
            return VisionOptions.resolved(self)
        size = self.image_size or 32
        return VisionOptions.resolved(self.replace(model_options=_SMALL, image_size=size))


class _Staged(NamedTuple):
    """A batch, the last group that decides in it (-1: none), and the price of a wrong answer."""

    images: Tensor
    labels: Tensor
    last: int
    penalty: float


def run(options: IARed2Options) -> int:
    """Do ``manyheads train ia-red2``; returns the exit code."""
    return launch(options, _prepare, train)


def _prepare(options: IARed2Options) -> Prepared:
    from manyheads.models.base import get_variant

    if not issubclass(get_variant(options.model).model, Dropping):
        raise ValueError(f"model {options.model!r} has no interpreters: take ia_red2_deit_small")
    return prepare(options)


def train(
    fabric: Fabric, options: IARed2Options, prepared: Prepared, stop: StopRequest
) -> dict[str, Any]:
    """Train in this process, alone or beside others; returns the results."""
    return train_vision(fabric, options, prepared, stop, procedure=_Curriculum(options))


class _Curriculum(Procedure):
    """The backbone alone, then the first interpreter, then the first two, and so on."""

    def __init__(self, options: IARed2Options) -> None:
        self.options, self.groups = options, 1

    def begin(self, model: Any) -> None:
        self.groups = len(model.unfreeze_interpreters().depths)

    def batches(self, batches: Batches) -> Batches:
        return _StagedBatches(batches, self)

    def stage(self, step: int) -> tuple[int, float]:
        """Return the last group that decides at a step, -1 for none, and the penalty."""
        dense = round(self.options.dense_share * self.options.steps)
        if step < dense:
            return -1, 0.0
        last = (step - dense) * self.groups // max(self.options.steps - dense, 1)
        last = min(last, self.groups - 1)
        penalties = self.options.penalties
        return last, penalties[min(last, len(penalties) - 1)]

    def loss(self, module: nn.Module, batch: _Staged) -> Tensor:
        o = self.options
        # A Fabric module lets other methods than forward through once it is told of them.
        if hasattr(module, "mark_forward_method"):
            module.mark_forward_method("look")  # type: ignore[operator]
        decides = batch.last >= 0
        return dropping_loss(
            module,  # type: ignore[arg-type]
            batch.images,
            batch.labels,
            last=batch.last if decides else 0,
            penalty=batch.penalty,
            explore=o.explore,
            policy_weight=o.policy_weight,
            smoothing=o.smoothing,
            dense=not decides,
        )

    def figures(
        self,
        fabric: Fabric,
        model: Any,
        split: ImageSplit,
        in_channels: int,
        make: Any,
        stop: StopRequest,
    ) -> dict[str, float]:
        found = {}
        for name, dense in (("kept_share", False), ("dense_accuracy", True)):
            watched = _Watched(model, dense)
            right, count = accuracy(fabric, watched, split, in_channels, make, self.options, stop)
            found[name] = right / count if dense else float(watched.share / watched.seen)
        return found


class _StagedBatches:
    def __init__(self, batches: Batches, curriculum: _Curriculum) -> None:
        self.inner, self.curriculum = batches, curriculum

    def batch(self, step: int) -> _Staged:
        """Return batch ``step`` of this process, counted in parts of an optimiser step."""
        batch: Images = self.inner.batch(step)
        update = step // self.curriculum.options.accumulate
        return _Staged(batch.images, batch.labels, *self.curriculum.stage(update))


class _Watched(nn.Module):
    """Answers with dropping or without, and adds up the share of work that is done."""

    def __init__(self, model: Dropping, dense: bool) -> None:
        super().__init__()
        self.model, self.dense, self.share, self.seen = model, dense, 0.0, 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.model.look(x, decide=_all) if self.dense else self.model.look(x)
        self.share += float(out.cost.sum())
        self.seen += len(x)
        return out.logits


def _all(group: int, scores: Tensor, alive: Tensor) -> Tensor:
    return torch.ones_like(alive)
