"""LLM-Drop: attentions, MLPs and blocks dropped by similarity. Lossy, needs no training."""

from __future__ import annotations

from manyheads.compress.llm_drop.method import LLMDrop, LLMDropConfig, plan_from_lists
from manyheads.compress.llm_drop.select import (
    degradation_ratio,
    most_similar,
    run_of_blocks,
    within_tolerance,
)
from manyheads.compress.llm_drop.similarity import Similarities, measure_similarities

__all__ = [
    "LLMDrop",
    "LLMDropConfig",
    "Similarities",
    "degradation_ratio",
    "measure_similarities",
    "most_similar",
    "plan_from_lists",
    "run_of_blocks",
    "within_tolerance",
]
