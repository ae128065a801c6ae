"""IA-RED²: interpreters that drop the tokens of a vision transformer (2106.12620)."""

from manyheads.models.vision.ia_red2.config import IARed2Config
from manyheads.models.vision.ia_red2.dropping import Decision, Dropping, Outcome, heat_map
from manyheads.models.vision.ia_red2.interpreter import Interpreter, interpreter_reference
from manyheads.models.vision.ia_red2.model import IARed2
from manyheads.models.vision.ia_red2.policy import (
    bounded,
    draw_policy,
    greedy_policy,
    log_probability,
    policy_gradient_loss,
    reward,
)
from manyheads.models.vision.ia_red2.video import IARed2Video, IARed2VideoConfig
from manyheads.models.vision.ia_red2.wrap import DroppingViT, wrap

__all__ = [
    "Decision",
    "Dropping",
    "DroppingViT",
    "IARed2",
    "IARed2Config",
    "IARed2Video",
    "IARed2VideoConfig",
    "Interpreter",
    "Outcome",
    "bounded",
    "draw_policy",
    "greedy_policy",
    "heat_map",
    "interpreter_reference",
    "log_probability",
    "policy_gradient_loss",
    "reward",
    "wrap",
]
