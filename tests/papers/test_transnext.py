"""The parts of TransNeXt's claim that need no clock."""

from __future__ import annotations

from manyheads.papers.transnext import entropy_growth, seen_share


def test_one_layer_reads_every_place() -> None:
    assert seen_share() == 1


def test_the_log_of_the_length_halves_the_growth_of_entropy() -> None:
    plain, scaled = entropy_growth()
    assert 0 < scaled < 0.5 * plain
