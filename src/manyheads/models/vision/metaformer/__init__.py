"""MetaFormer and PoolFormer (2111.11418)."""

from manyheads.models.vision.metaformer.blocks import ChannelNorm, ConvMLP, MetaFormerBlock
from manyheads.models.vision.metaformer.config import MetaFormerConfig
from manyheads.models.vision.metaformer.model import MetaFormer

__all__ = ["ChannelNorm", "ConvMLP", "MetaFormer", "MetaFormerBlock", "MetaFormerConfig"]
