"""Procedures that make a model that exists already smaller or faster: one method, one file."""

from __future__ import annotations

from manyheads.compress.anatomy import Anatomy, anatomy
from manyheads.compress.files import Opened, load_model, open_model, save_model
from manyheads.compress.procedure import (
    Plan,
    Procedure,
    fingerprint,
    get_procedure,
    list_procedures,
)

__all__ = [
    "Anatomy",
    "Opened",
    "Plan",
    "Procedure",
    "anatomy",
    "fingerprint",
    "get_procedure",
    "list_procedures",
    "load_model",
    "open_model",
    "save_model",
]
