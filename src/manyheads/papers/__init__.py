"""One card a paper: what it is, where it lives here, and its claim as a function that measures."""

from __future__ import annotations

from manyheads.papers.base import Check, Claim, Measurement, Paper
from manyheads.papers.index import PAPERS, get_paper, is_in

__all__ = ["PAPERS", "Check", "Claim", "Measurement", "Paper", "get_paper", "is_in"]
