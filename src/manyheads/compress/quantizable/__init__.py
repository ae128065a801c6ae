"""Outliers of activations, simulated quantisers, and models in 8-bit integers (2306.12929)."""

from __future__ import annotations

from manyheads.compress.quantizable.estimators import RangeEstimator, Scheme
from manyheads.compress.quantizable.int8 import Int8Linear
from manyheads.compress.quantizable.method import Int8, Int8Config
from manyheads.compress.quantizable.outliers import Outliers, inf_norm, kurtosis, measure_outliers
from manyheads.compress.quantizable.quantizers import UniformQuantizer
from manyheads.compress.quantizable.simulate import simulate_quantization

__all__ = [
    "Int8",
    "Int8Config",
    "Int8Linear",
    "Outliers",
    "RangeEstimator",
    "Scheme",
    "UniformQuantizer",
    "inf_norm",
    "kurtosis",
    "measure_outliers",
    "simulate_quantization",
]
