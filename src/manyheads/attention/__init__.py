"""The main hall: one mechanism, one file.

Every function takes (batch, heads, length, head_dim) tensors as scaled_dot_product_attention
does; every module takes (batch, length, embed_dim). ``manyheads.list_mechanisms()`` names them.
"""

from __future__ import annotations

from manyheads.attention.diag import (
    DiagAttention,
    DiagConfig,
    diag,
    diag_reference,
    diag_step,
    diag_update,
    diag_weights,
)
from manyheads.attention.gla import (
    GatedLinearAttention,
    GLAConfig,
    gla,
    gla_reference,
    gla_step,
    gla_update,
    gla_weights,
)
from manyheads.attention.norm import (
    NormAttention,
    NormConfig,
    norm,
    norm_reference,
    norm_step,
    norm_update,
    norm_weights,
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
from manyheads.attention.urpe import (
    URPEAttention,
    URPEConfig,
    add_urpe,
    urpe,
    urpe_from_lse,
    urpe_reference,
    urpe_step,
    urpe_update,
    urpe_weights,
)

__all__ = [
    "DiagAttention",
    "DiagConfig",
    "GLAConfig",
    "GatedLinearAttention",
    "NormAttention",
    "NormConfig",
    "SoftmaxAttention",
    "SoftmaxConfig",
    "URPEAttention",
    "URPEConfig",
    "add_urpe",
    "diag",
    "diag_reference",
    "diag_step",
    "diag_update",
    "diag_weights",
    "gla",
    "gla_reference",
    "gla_step",
    "gla_update",
    "gla_weights",
    "norm",
    "norm_reference",
    "norm_step",
    "norm_update",
    "norm_weights",
    "softmax",
    "softmax_reference",
    "softmax_step",
    "softmax_update",
    "softmax_weights",
    "urpe",
    "urpe_from_lse",
    "urpe_reference",
    "urpe_step",
    "urpe_update",
    "urpe_weights",
]
