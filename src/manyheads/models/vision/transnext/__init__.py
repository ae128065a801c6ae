"""TransNeXt (2311.17132)."""

from manyheads.models.vision.transnext.blocks import ConvGLU, TransNeXtBlock
from manyheads.models.vision.transnext.config import TransNeXtConfig
from manyheads.models.vision.transnext.model import TransNeXt

__all__ = ["ConvGLU", "TransNeXt", "TransNeXtBlock", "TransNeXtConfig"]
