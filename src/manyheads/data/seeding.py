"""Random numbers that depend on where they are used and on nothing else."""

from __future__ import annotations

import numpy as np

__all__ = ["check_rank", "generator"]


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
