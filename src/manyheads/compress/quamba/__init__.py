"""Quamba: static 8-bit quantisation of Mamba (arXiv 2410.13229). Lossy, needs no training.

Every weight and activation of a Mamba block becomes an int8 code times one scale for the tensor.
Two tricks make that work: the scan's input u is clipped at a high percentile of what a calibration
saw, since the recurrence amplifies the coarse steps that a few large values would cost; and the
scan's output is rotated by a Hadamard matrix, which spreads its outliers over all channels.
"""

from __future__ import annotations

from manyheads.compress.quamba.block import WEIGHT_NAMES, Int8Mamba, activation_scales
from manyheads.compress.quamba.calibrate import Scales, calibrate, calibrate_block
from manyheads.compress.quamba.hadamard import (
    BASES,
    base_matrix,
    fold_hadamard,
    hadamard_matrix,
    hadamard_split,
    hadamard_transform,
)
from manyheads.compress.quamba.method import Quamba, QuambaConfig
from manyheads.compress.quamba.quantisers import (
    AsymmetricObserver,
    MinMaxObserver,
    Observer,
    PercentileObserver,
    absmax_scale,
    fake_quant,
    fake_quant_dynamic,
    quantise,
)
from manyheads.compress.quamba.simulate import SimulatedMamba
from manyheads.compress.quamba.sites import OFFICIAL_SITES, SITES

__all__ = [
    "BASES",
    "OFFICIAL_SITES",
    "SITES",
    "WEIGHT_NAMES",
    "AsymmetricObserver",
    "Int8Mamba",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "Quamba",
    "QuambaConfig",
    "Scales",
    "SimulatedMamba",
    "absmax_scale",
    "activation_scales",
    "base_matrix",
    "calibrate",
    "calibrate_block",
    "fake_quant",
    "fake_quant_dynamic",
    "fold_hadamard",
    "hadamard_matrix",
    "hadamard_split",
    "hadamard_transform",
    "quantise",
]
