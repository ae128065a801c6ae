"""Sharing the attention matrices of a model that exists between its layers (MASA, 2508.04581)."""

from __future__ import annotations

from manyheads.compress.masa.mathematics import (
    MatrixPCA,
    Refinement,
    allocate_ranks,
    kl_drift,
    low_rank_refinement,
    matrix_pca,
    runs_of_layers,
)
from manyheads.compress.masa.method import MASA, MASAConfig
from manyheads.compress.masa.slots import share_attention

__all__ = [
    "MASA",
    "MASAConfig",
    "MatrixPCA",
    "Refinement",
    "allocate_ranks",
    "kl_drift",
    "low_rank_refinement",
    "matrix_pca",
    "runs_of_layers",
    "share_attention",
]
