"""Whole systems, by what they eat: ``create_model(name)`` builds, ``list_models(glob)`` names."""

from __future__ import annotations

from manyheads.models.base import (
    Model,
    create_model,
    get_variant,
    list_models,
    load_model,
    register_variants,
)

__all__ = ["Model", "create_model", "get_variant", "list_models", "load_model", "register_variants"]
