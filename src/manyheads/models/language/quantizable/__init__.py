"""BERT and OPT whose heads can do nothing without outliers: Quantizable Transformers, 2306.12929.

A clipped softmax or gates on the heads, in training, keep activations small enough for 8 bits.
Official names and parameter counts; the points that the paper quantises are open (see
``manyheads.compress.quantizable``).
"""

from __future__ import annotations

from manyheads.models.language.quantizable.attention import (
    ActivatedLinear,
    BERTSelfAttention,
    HostAttention,
    OPTSelfAttention,
)
from manyheads.models.language.quantizable.bert import (
    QuantizableBERT,
    QuantizableBERTConfig,
    masked_token_loss,
)
from manyheads.models.language.quantizable.config import QuantizableConfig
from manyheads.models.language.quantizable.opt import QuantizableOPT, QuantizableOPTConfig

__all__ = [
    "ActivatedLinear",
    "BERTSelfAttention",
    "HostAttention",
    "OPTSelfAttention",
    "QuantizableBERT",
    "QuantizableBERTConfig",
    "QuantizableConfig",
    "QuantizableOPT",
    "QuantizableOPTConfig",
    "masked_token_loss",
]
