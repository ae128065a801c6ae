"""DualToken-ViT (2309.12424): an independent reconstruction; no code or weights were published.

B batch, C channels, H and W rows and columns, N = H · W, G side of the grid of global tokens.

Three stages at strides 8, 16 and 32; every block mixes a map (B, H, W, C) by a convolution and by
7 x 7 global tokens that travel through the whole network:

    x += fuse(x_local, x_global);  x += BiAttn(MLP(LN(x)));  g = g_new

Stem, merging and the attention behind the MLP are LightViT's, as the authors say. Chu et al.,
"DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion". Widths and
depths of the variants are calibrated to the published FLOPs, not published.
"""

from __future__ import annotations

from manyheads.models.base import register_variants
from manyheads.models.vision.dualtoken.blocks import BiAttnMLP, ConvStem, DualTokenBlock, Merge
from manyheads.models.vision.dualtoken.model import DualTokenConfig, DualTokenViT

__all__ = [
    "BiAttnMLP",
    "ConvStem",
    "DualTokenBlock",
    "DualTokenConfig",
    "DualTokenViT",
    "Merge",
]

_SMALL = DualTokenConfig()
register_variants(
    DualTokenViT,
    "dualtoken",
    {
        "dualtoken_vit_tiny": (
            DualTokenConfig(embed_dims=(48, 96, 192), depths=(2, 6, 3)),
            ("dualtoken_vit_t",),
        ),
        "dualtoken_vit_small": (_SMALL, ("dualtoken_vit_s",)),
        "dualtoken_vit_small_mlp": (_SMALL.replace(mix=False), ("dualtoken_vit_s_mlp",)),
    },
)
