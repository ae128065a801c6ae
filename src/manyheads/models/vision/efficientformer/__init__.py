"""EfficientFormer: pooling and convolutions on maps, attention on the last tokens (2206.01191).

B batch, C channels, H and W rows and columns, N = H · W.

Blocks on maps (B, C, H, W): x += s1 · pool(x); x += s2 · mlp(x), an MLP of 1 x 1 convolutions with
batch norms and no norm before either. Then, once, to tokens (B, N, C), and blocks with layer norms
before attention (:mod:`manyheads.attention.grid.distance`) and MLP. Li et al., "EfficientFormer:
Vision Transformers at MobileNet Speed". Images of any size: biases are made for ``image_size`` and
resized by distance for others; the authors' code takes images of 224 alone.
"""

from manyheads.models.vision.efficientformer.blocks import MapBlock, TokenBlock
from manyheads.models.vision.efficientformer.config import EfficientFormerConfig
from manyheads.models.vision.efficientformer.model import EfficientFormer

__all__ = ["EfficientFormer", "EfficientFormerConfig", "MapBlock", "TokenBlock"]
