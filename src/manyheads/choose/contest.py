"""A task that small models compete in, and the small model itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from manyheads.choose.race import Figure
from manyheads.choose.workload import Workload
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.models.language.pattern import parse_pattern

__all__ = ["EMBED_DIM", "NUM_HEADS", "Contest", "model_layers", "small_lm"]

# Wide enough that mechanisms differ, small enough for a few hundred steps a minute on two cores.
EMBED_DIM, NUM_HEADS = 128, 4


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One task for all mechanisms.

    Attributes:
        task: text, images, recall, copy or listops.
        metric: bits_per_byte or accuracy.
        build: makes the model of a candidate, from the same seed.
        loss: of training batch ``step``.
        evaluate: on held-out data.
        tokens_a_step: tokens of a training batch.
        chance: the value of guessing.
        length: tokens that the stated state has read.
        details: what the reader should know of the sizes.
    """

    task: str
    metric: str
    build: Callable[[str], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    evaluate: Callable[[nn.Module], Figure]
    tokens_a_step: int
    chance: float
    length: int
    details: dict[str, Any]


def model_layers(workload: Workload) -> int:
    """Return the number of layers that all candidates' patterns divide, at least the asked one."""
    lengths = [len(parse_pattern(m)) for m in workload.candidates]
    unit = math.lcm(*lengths)
    return unit * -(-workload.layers // unit)


def small_lm(workload: Workload, mixer: str, *, vocab_size: int, length: int) -> MixerLM:
    """Build the small model of a candidate, the same but for its mixers."""
    return MixerLM(
        MixerLMConfig(
            vocab_size=vocab_size,
            embed_dim=EMBED_DIM,
            num_heads=NUM_HEADS,
            num_layers=model_layers(workload),
            mixers=mixer,
            max_length=max(length, 16),
        )
    )
