"""Random numbers that depend on where they are used and on nothing else."""

from __future__ import annotations

import numpy as np

__all__ = ["check_rank", "epoch_indices", "generator", "hold_out_indices"]


def generator(seed: int, *path: int) -> np.random.Generator:
    """Return the generator of one place, such as (seed, epoch) or (seed, sample, attempt).

    Raises:
        ValueError: a negative number.
    """
    if min(seed, *path, 0) < 0:
        raise ValueError(f"seed {seed} and place {path} must not be negative")
    sequence = np.random.SeedSequence(seed, spawn_key=path)
    return np.random.Generator(np.random.PCG64(sequence))


def check_rank(batch_size: int, rank: int, world_size: int) -> None:
    """Check how a batch is dealt to processes.

    Raises:
        ValueError: a batch below 1, or a rank outside [0, world_size).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not below world_size {world_size}")


def epoch_indices(
    step: int, count: int, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> list[int]:
    """Return which of ``count`` samples make batch ``step`` of one process.

    Every sample occurs once an epoch, none is dropped; batches run on over the border of epochs.
    Two processes with batch 4 see the samples of one process with batch 8.
    """
    first = (step * world_size + rank) * batch_size
    numbers = range(first, first + batch_size)
    orders = {e: generator(seed, e).permutation(count) for e in {n // count for n in numbers}}
    return [int(orders[n // count][n % count]) for n in numbers]


def hold_out_indices(
    labels: np.ndarray, fraction: float, seed: int, *, option: str, what: str
) -> tuple[list[int], list[int]]:
    """Hold out a share of each class, at least one sample of it.

    Args:
        labels: class numbers, (B,).
        fraction: the share.
        seed: of the choice, which in a class does not depend on the others.
        option: name of the share, for the error.
        what: a name for samples, for the error.

    Returns:
        Places that are left, and places that are held out, both ascending.

    Raises:
        ValueError: a class has too few samples for both parts.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = max(1, round(len(members) * fraction))
        if count >= len(members):
            raise ValueError(
                f"{option} {fraction} leaves no training {what} of a class that has "
                f"{len(members)}: give less, or more {what}"
            )
        held[members[generator(seed, label).permutation(len(members))[:count]]] = True
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()
