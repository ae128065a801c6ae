"""SOFT: a four-stage backbone with softmax-free attention (2207.03341).

B batch, C channels, H and W rows and columns, N = H · W.

Stages 1 to 3, on maps (B, H, W, C), norms behind the sums: x = LN(x + drop(soft(x))) and
x = LN(x + drop(W2 gelu(W1 x))), with the tanh form of GELU and element-wise dropout. Stage 4 is a
pre-norm transformer on the places and a class token, which alone is classified. Lu et al.,
"Softmax-free Linear Transformers". Official numerics; ``max_landmarks`` departs from them.
"""

from __future__ import annotations

from manyheads.models.base import register_variants
from manyheads.models.vision.soft.blocks import SoftBlock, TokenBlock
from manyheads.models.vision.soft.config import SOFTConfig
from manyheads.models.vision.soft.model import SOFT

__all__ = ["SOFT", "SOFTConfig", "SoftBlock", "TokenBlock"]


def _table() -> dict[str, tuple[SOFTConfig, tuple[str, ...]]]:
    sizes = {
        "tiny": ((1, 2, 3, 2), 320, 10),
        "small": ((1, 3, 20, 4), 320, 10),
        "small_published": ((1, 3, 7, 4), 320, 10),
        "medium": ((1, 3, 29, 5), 288, 9),
        "large": ((1, 3, 40, 5), 320, 10),
        "huge": ((1, 5, 49, 5), 352, 11),
    }
    return {
        prefix + name: (
            SOFTConfig(
                depths=depths,
                embed_dims=(64, 128, third, 512),
                num_heads=(2, 4, heads, 16),
                normalise=normalise,
            ),
            (),
        )
        for prefix, normalise in (("soft_", False), ("soft_norm_", True))
        for name, (depths, third, heads) in sizes.items()
    }


register_variants(SOFT, "soft", _table())
