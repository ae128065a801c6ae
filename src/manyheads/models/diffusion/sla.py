"""Sparse-linear attention modules of published size: what one self-attention layer adds to its
host, whose weights are all fine-tuned along with it (2509.24006).
"""

from __future__ import annotations

from typing import ClassVar, Self

from manyheads.attention.sla import SparseLinearAttention, SparseLinearConfig
from manyheads.config import Config
from manyheads.models.base import Model, register_variants

__all__ = ["SLAModule"]


class SLAModule(SparseLinearAttention, Model):
    """`SparseLinearAttention` as a model: built by name, saved and loaded. Needs fine-tuning.

    One for each self-attention layer; ``create_model("sla_wan2_1_1_3b")`` has the 16,512 weights
    of a layer of Wan2.1-1.3B (30 layers, 12 heads of 128).

    Example:
        >>> SLAModule(128).num_parameters()
        16512
    """

    config_class: ClassVar[type[Config]] = SparseLinearConfig

    @classmethod
    def from_config(cls, config: Config) -> Self:
        return cls(**config.to_dict())


register_variants(
    SLAModule,
    "sla",
    {
        "sla_wan2_1_1_3b": (SparseLinearConfig(head_dim=128), ("wan2_1_head128",)),
        "sla1_wan2_1_1_3b": (SparseLinearConfig(head_dim=128, variant="sla1"), ()),
        "sla_paper_wan2_1_1_3b": (SparseLinearConfig(head_dim=128, variant="paper"), ()),
    },
)
