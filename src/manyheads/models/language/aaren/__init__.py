"""Aaren models: the layer, the stack, and models for the paper's four kinds of task (2405.13956).

All are causal, train in parallel and stream in constant memory. No official code exists; norm
placement and the task models are a reconstruction.
"""

from __future__ import annotations

from manyheads.models.language.aaren.classify import AarenClassifier, AarenClassifierConfig
from manyheads.models.language.aaren.events import (
    AarenEventModel,
    AarenEventsConfig,
    EventState,
    NextEvent,
)
from manyheads.models.language.aaren.forecast import (
    AarenForecaster,
    AarenForecasterConfig,
    ForecastState,
)
from manyheads.models.language.aaren.layer import AarenLayer, AarenLayerConfig
from manyheads.models.language.aaren.policy import AarenPolicy, AarenPolicyConfig
from manyheads.models.language.aaren.stack import AarenStack, AarenStackConfig

__all__ = [
    "AarenClassifier",
    "AarenClassifierConfig",
    "AarenEventModel",
    "AarenEventsConfig",
    "AarenForecaster",
    "AarenForecasterConfig",
    "AarenLayer",
    "AarenLayerConfig",
    "AarenPolicy",
    "AarenPolicyConfig",
    "AarenStack",
    "AarenStackConfig",
    "EventState",
    "ForecastState",
    "NextEvent",
]
