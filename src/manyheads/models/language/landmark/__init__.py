"""Language models with landmark attention: the paper's GPT, and LLaMA (2305.16300)."""

from __future__ import annotations

from manyheads.models.language.landmark.base import LandmarkLM
from manyheads.models.language.landmark.gpt import LandmarkGPT, LandmarkGPTConfig
from manyheads.models.language.landmark.llama import LandmarkLlama, LandmarkLlamaConfig
from manyheads.models.language.landmark.weights import add_token, apply_weight_diff

__all__ = [
    "LandmarkGPT",
    "LandmarkGPTConfig",
    "LandmarkLM",
    "LandmarkLlama",
    "LandmarkLlamaConfig",
    "add_token",
    "apply_weight_diff",
]
