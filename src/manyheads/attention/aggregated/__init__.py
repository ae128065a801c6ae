"""Aggregated attention of TransNeXt: window and pooled view of a map under one softmax."""

from manyheads.attention.aggregated.definition import aggregated_reference, aggregated_weights
from manyheads.attention.aggregated.module import (
    AggregatedAttention,
    LengthScaledAttention,
    PositionMode,
)
from manyheads.attention.aggregated.op import aggregated

__all__ = [
    "AggregatedAttention",
    "LengthScaledAttention",
    "PositionMode",
    "aggregated",
    "aggregated_reference",
    "aggregated_weights",
]
