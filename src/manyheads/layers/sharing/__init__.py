"""Linear layers whose weights are mixed from atoms that several layers share (MASA, 2508.04581).

W_l = Σ_s c_ls D_s: S atoms D_s (out, in) for L layers, one dictionary a projection. With S = L/3
two thirds of the parameters are gone, and what trains a model trains it without further terms.
"""

from __future__ import annotations

from manyheads.layers.sharing.build import (
    PROJECTIONS,
    AtomStore,
    Part,
    SharingConfig,
    Slot,
    install,
    named_slots,
    share,
    slot_weight,
    store_coefficients,
    to_dense,
)
from manyheads.layers.sharing.dictionary import AtomDictionary, CoefficientNetwork
from manyheads.layers.sharing.linear import LowRankLinear, SharedLinear
from manyheads.layers.sharing.op import mix, shared_linear, shared_linear_reference

__all__ = [
    "PROJECTIONS",
    "AtomDictionary",
    "AtomStore",
    "CoefficientNetwork",
    "LowRankLinear",
    "Part",
    "SharedLinear",
    "SharingConfig",
    "Slot",
    "install",
    "mix",
    "named_slots",
    "share",
    "shared_linear",
    "shared_linear_reference",
    "slot_weight",
    "store_coefficients",
    "to_dense",
]
