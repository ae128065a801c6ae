"""The state of a run in its checkpoint: tensors, generators of all processes, and its position."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from manyheads.models.base import Model
from manyheads.train.checkpoint import (
    model_tensors,
    optimizer_tensors,
    read_checkpoint,
    restore_optimizer,
    restore_tensors,
    rng_state,
    set_rng_state,
    write_checkpoint,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Position", "load_state", "read_position", "save_state"]


@dataclass
class Position:
    """Where a run stands, beside its tensors; goes into the checkpoint as it is.

    Attributes:
        step: steps done; the batches, the schedule and the log follow from it.
        evaluated: step of the last evaluation.
        best, best_step: the best figure so far, and when.
        loss_sum, loss_count: of the row of the log that is being gathered.
        seconds: wall time of all parts of the run.
    """

    step: int = 0
    evaluated: int = -1
    best: float | None = None
    best_step: int = -1
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0


def save_state(
    fabric: Fabric,
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    at: Position,
    shadow: Model | None = None,
) -> None:
    """Write the checkpoint; called by every process, written by the first.

    Args:
        shadow: a second model whose tensors go along, of averaged weights.
    """
    states = {k: cast(Tensor, fabric.all_gather(s)) for k, s in rng_state(fabric.device).items()}
    if not fabric.is_global_zero:
        return
    rng = {f"rng.{k}": s.view(fabric.world_size, -1).cpu() for k, s in states.items()}
    tensors = {**model_tensors(model), **optimizer_tensors(optimizer, model), **rng}
    if shadow is not None:
        tensors |= {f"shadow.{k}": t.clone() for k, t in model_tensors(shadow).items()}
    scalars = asdict(at) | {"threads": torch.get_num_threads(), "processes": fabric.world_size}
    write_checkpoint(path, tensors, scalars)


def read_position(path: Path) -> Position:
    """Return where the run of a checkpoint stands."""
    _, scalars = read_checkpoint(path)
    return Position(**{k: v for k, v in scalars.items() if k not in ("processes", "threads")})


def load_state(
    fabric: Fabric,
    path: Path,
    model: Model,
    optimizer: torch.optim.Optimizer,
    shadow: Model | None = None,
) -> Position:
    """Go on from a checkpoint, or from the start where there is none.

    Equal to an uninterrupted run to the bit, on as many processes of as many threads as before;
    on others (said by a warning) to rounding, and dropout draws anew.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    if not path.is_file():
        return Position()
    tensors, scalars = read_checkpoint(path)
    restore_tensors(model, tensors, path)
    restore_optimizer(optimizer, model, tensors)
    if shadow is not None:
        theirs = {
            k.removeprefix("shadow."): t for k, t in tensors.items() if k.startswith("shadow.")
        }
        restore_tensors(shadow, theirs, path)
    before = scalars.pop("processes"), scalars.pop("threads")
    now = fabric.world_size, torch.get_num_threads()
    if before != now and fabric.is_global_zero:
        warnings.warn(
            f"the run had {before[0]} processes of {before[1]} threads, now {now[0]} of {now[1]}: "
            "it goes on equal to rounding, not to the bit"
        )
    if fabric.global_rank < before[0]:
        rows = {k.removeprefix("rng."): t for k, t in tensors.items() if k.startswith("rng.")}
        set_rng_state({k: t[fabric.global_rank] for k, t in rows.items()}, fabric.device)
    return Position(**scalars)
