"""The main hall: one mechanism, one file.

Every function takes (batch, heads, length, head_dim) tensors as scaled_dot_product_attention
does; every module takes (batch, length, embed_dim). ``manyheads.list_mechanisms()`` names them.
"""

from __future__ import annotations

from manyheads.attention.gla import (
    GatedLinearAttention,
    GLAConfig,
    gla,
    gla_reference,
    gla_step,
    gla_update,
    gla_weights,
)
from manyheads.attention.softmax import (
    SoftmaxAttention,
    SoftmaxConfig,
    softmax,
    softmax_reference,
    softmax_step,
    softmax_update,
    softmax_weights,
)

__all__ = [
    "GLAConfig",
    "GatedLinearAttention",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "gla",
    "gla_reference",
    "gla_step",
    "gla_update",
    "gla_weights",
    "softmax",
    "softmax_reference",
    "softmax_step",
    "softmax_update",
    "softmax_weights",
]
