"""Procedures that make a model that exists already smaller or faster: one method, one file."""

from __future__ import annotations

from manyheads.compress.procedure import (
    Plan,
    Procedure,
    fingerprint,
    get_procedure,
    list_procedures,
)

__all__ = ["Plan", "Procedure", "fingerprint", "get_procedure", "list_procedures"]
