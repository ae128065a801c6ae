"""VOLO: the backbone, mix-token, token labels (2106.13112)."""

from manyheads.models.vision.volo.config import VOLOConfig
from manyheads.models.vision.volo.losses import soft_target_loss, token_label_loss
from manyheads.models.vision.volo.mixing import Box, mix_box, mix_tokens
from manyheads.models.vision.volo.model import VOLO, TokenOutputs
from manyheads.models.vision.volo.targets import mixed_targets, token_targets

__all__ = [
    "VOLO",
    "Box",
    "TokenOutputs",
    "VOLOConfig",
    "mix_box",
    "mix_tokens",
    "mixed_targets",
    "soft_target_loss",
    "token_label_loss",
    "token_targets",
]
