"""AdamW with decay where it belongs, and a learning rate of one formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.layers.sharing import AtomDictionary, CoefficientNetwork

__all__ = ["adamw", "cosine", "parameter_groups", "set_learning_rate"]

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trainable parameters into those that decay and those that do not.

    The weights of linear and convolution layers decay, and the atoms that layers share. Norms,
    biases, embeddings (also where one is tied to an output matrix), tables of positions, gates,
    coefficients of atoms, what makes them, and bare parameters do not.
    """
    matrices: set[Tensor] = set()
    embeddings: set[Tensor] = set()
    for module in model.modules():
        if isinstance(module, AtomDictionary):
            matrices.add(module.atoms)
        elif isinstance(module, CoefficientNetwork):
            embeddings.update(module.parameters())
        elif isinstance(module, _MATRICES):
            matrices.add(module.weight)
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.add(module.weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p in matrices - embeddings]
    others = [p for p in trained if p not in matrices - embeddings]
    groups = [(decayed, weight_decay), (others, 0.0)]
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """Return AdamW over the groups of :func:`parameter_groups`.

    The fused form is used where torch has one for the device; on a CPU it takes a fraction of the
    time of the plain one.
    """
    devices = {p.device.type for p in model.parameters()}
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(
        groups, lr=learning_rate, betas=betas, eps=1e-8, fused=devices <= {"cpu", "cuda"}
    )


def cosine(step: int, *, steps: int, warmup: int, floor: float = 0.0) -> float:
    """Return the factor on the learning rate at update ``step`` = 0, 1, ..., ``steps`` - 1.

    It rises linearly to 1 at the last of ``warmup`` updates, then falls as half a cosine to
    ``floor`` at the last update.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = min((step + 1 - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate
