"""Slimming to a latency: drop blocks, narrow stages, turn tokens into maps. A reconstruction.

The paper describes the greedy search (section 4.2); its code was not published. What it leaves
open and is chosen here: α enters importances through a softmax; a stage keeps at least one block
and 16 channels; blocks on tokens start in the last stage alone, as in the published models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from manyheads.models.vision.efficientformer.config import EfficientFormerConfig
from manyheads.models.vision.efficientformer.supernet import Supernet

__all__ = ["STEP", "Architecture", "LatencyTable", "Slimming", "slim"]

STEP = 16


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A candidate of the search.

    Attributes:
        slots: of each stage, the indices of the supernet's slots that are kept.
        widths: channels of each stage.
        token_blocks: the last so many blocks of the last stage work on tokens.
    """

    slots: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...]
    token_blocks: int

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return tuple(len(s) for s in self.slots)

    def config(self, base: EfficientFormerConfig | None = None) -> EfficientFormerConfig:
        """Return the config of a model to train, other fields as in ``base``."""
        sizes = {"depths": self.depths, "embed_dims": self.widths,
                 "token_blocks": self.token_blocks}  # fmt: skip
        return (base or EfficientFormerConfig()).replace(**sizes)


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Milliseconds of parts, measured once; a network's latency is the sum of its parts'.

    Attributes:
        milliseconds: by "kind/stage/width": "stem/0/48", "embed/1/96" (what leads into a stage),
            "map/1/96", "token/3/448".
    """

    milliseconds: Mapping[str, float]

    def __call__(self, architecture: Architecture) -> float:
        """Return the latency in milliseconds.

        Raises:
            ValueError: a part that was not measured.
        """
        total = 0.0
        last = len(architecture.widths) - 1
        for stage, width in enumerate(architecture.widths):
            tokens = architecture.token_blocks if stage == last else 0
            total += self._of("embed" if stage else "stem", stage, width)
            if maps := architecture.depths[stage] - tokens:
                total += maps * self._of("map", stage, width)
            if tokens:
                total += tokens * self._of("token", stage, width)
        return total

    def _of(self, kind: str, stage: int, width: int) -> float:
        name = f"{kind}/{stage}/{width}"
        if name not in self.milliseconds:
            raise ValueError(f"no latency of {name!r} in the table: measure widths up to {width}")
        return self.milliseconds[name]

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON."""
        Path(path).write_text(json.dumps(dict(self.milliseconds), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> LatencyTable:
        """Read what :meth:`save` wrote."""
        return cls(milliseconds=json.loads(Path(path).read_text()))


@dataclass(frozen=True, kw_only=True)
class Slimming:
    """What a search found.

    Attributes:
        architecture: the first one within the target.
        latency: of it, in milliseconds.
        steps: action ("drop", "narrow", "turn"), accuracy and milliseconds after each step.
    """

    architecture: Architecture
    latency: float
    steps: tuple[tuple[str, float, float], ...]


def slim(
    supernet: Supernet,
    latency_fn: Callable[[Architecture], float],
    target_ms: float,
    eval_fn: Callable[[Architecture], float],
) -> Slimming:
    """Make a trained supernet's architecture as fast as asked, greedily.

    Each step tries to drop the least important slot, to narrow the least important stage by 16
    channels, and to turn the first block on tokens into one on maps; it takes what loses the least
    accuracy a millisecond. The result is an architecture to train anew: weights are not carried.

    Args:
        supernet: trained, for its importances.
        latency_fn: milliseconds of an architecture, a :class:`LatencyTable` for one.
        target_ms: milliseconds to reach.
        eval_fn: accuracy of an architecture, higher is better, however estimated.

    Raises:
        ValueError: no step shortens the latency any more and the target is not reached.
    """
    importances = [[slot.importance() for slot in stage] for stage in supernet.slots()]
    now = _start(supernet)
    latency, accuracy = latency_fn(now), eval_fn(now)
    steps: list[tuple[str, float, float]] = []
    while latency > target_ms:
        best: tuple[float, str, Architecture, float, float] | None = None
        for action, candidate in _candidates(now, importances):
            saved = latency - latency_fn(candidate)
            if saved <= 0:
                continue
            reached = eval_fn(candidate)
            cost = (accuracy - reached) / saved
            if best is None or cost < best[0]:
                best = (cost, action, candidate, latency - saved, reached)
        if best is None:
            raise ValueError(
                f"target_ms {target_ms} is out of reach: {latency:.3f} ms is the least that "
                f"depths {now.depths} and widths {now.widths} come down to"
            )
        _, action, now, latency, accuracy = best
        steps.append((action, accuracy, latency))
    return Slimming(architecture=now, latency=latency, steps=tuple(steps))


def _start(supernet: Supernet) -> Architecture:
    """All slots; blocks on tokens from where the last stage prefers them to its end."""
    stages, tokens = supernet.slots(), 0
    for slot in reversed(stages[-1]):
        on_map, on_tokens = slot.logits.detach()[:2].tolist()
        if on_tokens < on_map:
            break
        tokens += 1
    return Architecture(
        slots=tuple(tuple(range(len(s))) for s in stages),
        widths=supernet.config.embed_dims,
        token_blocks=tokens,
    )


def _candidates(
    now: Architecture, importances: list[list[float]]
) -> list[tuple[str, Architecture]]:
    found = []
    kept = [(importances[i][j], i, j) for i, slots in enumerate(now.slots) if len(slots) > 1
            for j in slots]  # fmt: skip
    if kept:
        _, stage, slot = min(kept)
        is_last = stage == len(now.slots) - 1
        gone = is_last and now.slots[stage].index(slot) >= now.depths[stage] - now.token_blocks
        slots = tuple(
            tuple(j for j in s if (i, j) != (stage, slot)) for i, s in enumerate(now.slots)
        )
        drop = replace(now, slots=slots, token_blocks=now.token_blocks - gone)
        found.append(("drop", drop))
    wide = [(sum(importances[i][j] for j in now.slots[i]), i)
            for i, width in enumerate(now.widths) if width > STEP]  # fmt: skip
    if wide:
        _, stage = min(wide)
        widths = tuple(w - STEP * (i == stage) for i, w in enumerate(now.widths))
        found.append(("narrow", replace(now, widths=widths)))
    if now.token_blocks:
        found.append(("turn", replace(now, token_blocks=now.token_blocks - 1)))
    return found
