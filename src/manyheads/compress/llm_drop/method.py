"""LLM-Drop: delete the blocks, attentions or MLPs that change the residual stream least.

Lossy, training-free. "What Matters in Transformers? Not All Attention is Needed"
(arXiv 2406.15786). Similarity of a branch: cos(x, x + branch(norm(x))) per token; the most
similar go. A dropped attention takes its norm, its weights and its cache with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from manyheads.compress.anatomy import Anatomy, anatomy
from manyheads.compress.llm_drop.remove import nothing_left, remove
from manyheads.compress.llm_drop.select import most_similar, run_of_blocks, within_tolerance
from manyheads.compress.llm_drop.similarity import Similarities, measure_similarities
from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.config import Config

__all__ = ["LLMDrop", "LLMDropConfig", "plan_from_lists"]

_KINDS = ("attention", "mlp", "cross")


@dataclass(frozen=True, kw_only=True, slots=True)
class LLMDropConfig(Config):
    """Options of LLM-Drop; exactly one of the counts is above zero.

    Attributes:
        attention: attention branches to drop
        mlp: MLP branches to drop
        blocks: whole blocks to drop
        joint: branches to drop, attentions and MLPs ranked together
        cross: cross-attention branches to drop (encoder-decoder models)
        consecutive: with blocks: drop blocks in a row, judged by the stream before and after all
        iterative: measure again after each drop (the paper finds it no better)
        norm_as_unit: judge a norm and its branch as one, by the stream before and after
        tolerance: similarities nearer than this count as equal, and the earlier goes first
        official_compat: the official code's choice of blocks in a row, one column too far
        stack: "encoder" or "decoder": drop there alone; "" for all
    """

    attention: int = 0
    mlp: int = 0
    blocks: int = 0
    joint: int = 0
    cross: int = 0
    consecutive: bool = False
    iterative: bool = False
    norm_as_unit: bool = True
    tolerance: float | None = None
    official_compat: bool = False
    stack: str = ""

    def __post_init__(self) -> None:
        counts = {n: getattr(self, n) for n in (*_KINDS, "blocks", "joint")}
        given = [n for n, v in counts.items() if v]
        if len(given) != 1 or counts[given[0]] < 0:
            raise ValueError(
                f"LLM-Drop drops one kind at a time, a count above 0 of {', '.join(counts)}; "
                f"given: {', '.join(f'{n}={counts[n]}' for n in given) or 'none'}"
            )
        if (self.consecutive or self.official_compat) and not self.blocks:
            raise ValueError("consecutive and official_compat are of blocks: give blocks=N")
        if self.consecutive and self.iterative:
            raise ValueError("consecutive blocks are chosen at once: leave iterative False")
        if self.stack not in ("", "encoder", "decoder"):
            raise ValueError(f"stack {self.stack!r} is none of: encoder, decoder, ''")

    @property
    def count(self) -> int:
        """How many go, whatever they are."""
        return self.attention or self.mlp or self.blocks or self.joint or self.cross


class LLMDrop(Procedure):
    """Drop attentions, MLPs or blocks by similarity. Lossy, needs no training.

    Example:
        >>> plan = LLMDrop(attention=2).plan(model, batches)
        >>> smaller = plan.apply(model)
    """

    name: ClassVar[str] = "llm-drop"
    settings_class: ClassVar[type[Config]] = LLMDropConfig
    settings: LLMDropConfig

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Measure similarities over the calibration and choose what goes.

        Raises:
            ValueError: no calibration, more to drop than there is, or a model that is not
                recognised, or shares its weights between layers (blocks alone can go then).
        """
        c = self.settings
        parts = anatomy(model)
        if parts.shared:
            return self._plan_shared(model, parts)
        _check_counts(c, parts)
        if calibration is None:
            raise ValueError("llm-drop judges branches by data: give calibration batches")
        if not c.iterative:
            found = self._measure(model, calibration, parts)
            chosen = _choose(
                c, parts, found, c.attention or c.mlp or c.blocks or c.joint or c.cross
            )
            structure = _structure(chosen)
            return self._plan(model, structure, measured=_measured(found, chosen))
        return self._plan_iterative(model, list(calibration))

    def _measure(
        self, model: nn.Module, calibration: Iterable[Batch], parts: Anatomy
    ) -> Similarities:
        c = self.settings
        return measure_similarities(
            model,
            calibration,
            parts=parts,
            norm_as_unit=c.norm_as_unit,
            consecutive=c.consecutive,
        )

    def _plan_iterative(self, model: nn.Module, calibration: Sequence[Batch]) -> Plan:
        c = self.settings
        chosen: list[tuple[str, str]] = []
        first = None
        for _ in range(c.count):
            current = copy.deepcopy(model)
            # Blocks stay where they are while we measure: a block goes as its two branches.
            remove(current, {"drop": _as_branches(chosen, anatomy(model))})
            parts = anatomy(current)
            found = self._measure(current, calibration, parts)
            first = first or found
            chosen += _choose(c, parts, found, 1, gone={p for _, p in chosen if c.blocks})
            _check_left(anatomy(model), chosen)
        assert first is not None
        return self._plan(model, _structure(chosen), measured=_measured(first, chosen))

    def _plan_shared(self, model: nn.Module, parts: Anatomy) -> Plan:
        c = self.settings
        if not c.blocks or c.consecutive:
            raise ValueError(
                f"the {parts.layers} layers of {type(model).__name__} share one block's weights: "
                "dropping a branch in one would drop it in all. Give blocks=N, which runs the "
                "block fewer times (faster, no fewer parameters)"
            )
        left = parts.layers - c.blocks
        if left < 1:
            raise ValueError(f"cannot drop {c.blocks} of {parts.layers} layers: one must remain")
        return self._plan(model, {"layers": left}, measured={"layers": parts.layers})

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        return remove(model, plan.structure)

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        return remove(model, structure)

    @classmethod
    def candidates(cls, model: nn.Module, given: dict[str, Any]) -> list[dict[str, Any]]:
        parts = anatomy(model)
        if parts.shared:
            return [given | {"blocks": n} for n in range(1, parts.layers)]
        kind = next((k for k in (*_KINDS, "blocks", "joint") if k in given), "joint")
        fixed = {k: v for k, v in given.items() if k != kind}
        roles = {"attention": 1, "mlp": 0, "cross": 0, "blocks": 1, "joint": 1}
        there = len(parts.blocks) * (2 if kind == "joint" else 1)
        most = max(1, there * 3 // 4) if kind == "joint" else there - roles[kind]
        return [fixed | {kind: n} for n in range(1, most + 1)]

    @classmethod
    def is_stock(cls, structure: dict[str, Any], model: nn.Module) -> bool:
        scaled = getattr(getattr(model, "config", None), "scale_attn_by_inverse_layer_idx", False)
        return not structure.get("drop") and not scaled


def plan_from_lists(
    model: nn.Module,
    *,
    drop_attn_list: Sequence[bool | int] = (),
    drop_mlp_list: Sequence[bool | int] = (),
) -> Plan:
    """Return the plan of an official dropped config's two lists.

    Args:
        model: undropped.
        drop_attn_list, drop_mlp_list: indices of layers, or one bool a layer.

    Raises:
        ValueError: an index beyond the model's layers, or bools of another count.
    """
    parts = anatomy(model)
    blocks = parts.stack(parts.stacks[-1])
    drop = {
        kind: [blocks[i].path for i in _indices(name, values, len(blocks))]
        for kind, name, values in (
            ("attention", "drop_attn_list", drop_attn_list),
            ("mlp", "drop_mlp_list", drop_mlp_list),
        )
    }
    method = LLMDrop(joint=max(1, sum(len(v) for v in drop.values())))
    return method._plan(model, {"drop": {k: v for k, v in drop.items() if v}, "blocks": []})


def _indices(name: str, values: Sequence[bool | int], layers: int) -> list[int]:
    if values and all(isinstance(v, bool) for v in values):  # a bool is an int as well
        if len(values) != layers:
            raise ValueError(f"{name} has {len(values)} bools for {layers} layers")
        return [i for i, v in enumerate(values) if v]
    for value in values:
        if isinstance(value, bool) or not 0 <= value < layers:
            raise ValueError(f"{name} names layer {value}, and the model has 0 to {layers - 1}")
    return [int(v) for v in values]


def _check_counts(c: LLMDropConfig, parts: Anatomy) -> None:
    if c.stack and not any(b.role == c.stack for b in parts.blocks):
        raise ValueError(f"stack {c.stack!r}: this model has no {c.stack}")
    if c.consecutive and len(_blocks(c, parts, set())) != len(parts.stack(parts.stacks[0])):
        raise ValueError("blocks in a row lie in one stack: give stack='encoder' or 'decoder'")
    for kind in _KINDS:
        asked, there = getattr(c, kind), len(_branches(c, parts, (kind,)))
        if asked > there:
            raise ValueError(f"cannot drop {asked} {kind} branches: the model has {there}")
    blocks = len(_blocks(c, parts, set()))
    if c.blocks >= blocks:
        raise ValueError(f"cannot drop {c.blocks} of {blocks} blocks: one must remain")
    both = len(_branches(c, parts, ("attention", "mlp")))
    if c.joint > both:
        raise ValueError(f"cannot drop {c.joint} branches: the model has {both}")


def _check_left(parts: Anatomy, chosen: Sequence[tuple[str, str]]) -> None:
    gone = {path for kind, path in chosen if kind in ("attention", "block")}
    for stack in parts.stacks:
        blocks = parts.stack(stack)
        kept = [b for b in blocks if b.of_kind("attention") and b.path not in gone]
        if blocks[0].role == "decoder" and not kept:
            raise ValueError(nothing_left(stack, len(blocks)))


def _branches(c: LLMDropConfig, parts: Anatomy, kinds: Sequence[str]) -> list[tuple[str, str]]:
    return [
        (kind, block.path)
        for kind in kinds
        for block in parts.blocks
        if (not c.stack or block.role == c.stack) and any(s.kind == kind for s in block.sublayers)
    ]


def _blocks(c: LLMDropConfig, parts: Anatomy, gone: set[str]) -> list[tuple[str, str]]:
    return [
        ("block", b.path)
        for b in parts.blocks
        if (not c.stack or b.role == c.stack) and b.path not in gone
    ]


def _choose(
    c: LLMDropConfig,
    parts: Anatomy,
    found: Similarities,
    n: int,
    gone: set[str] | None = None,
) -> list[tuple[str, str]]:
    """Return what goes as (kind, block path), in order of removal."""
    if c.blocks:
        candidates = _blocks(c, parts, gone or set())
        values = [found.blocks[path] for _, path in candidates]
        if c.consecutive:
            stack = next(b.stack for b in parts.blocks if b.path == candidates[0][1])
            run = run_of_blocks(found.consecutive[stack], n, official_compat=c.official_compat)
            return [candidates[i] for i in run]
    else:
        kinds = ("attention", "mlp") if c.joint else tuple(k for k in _KINDS if getattr(c, k))
        candidates = _branches(c, parts, kinds)
        values = [found.branches[kind][path] for kind, path in candidates]
    if c.tolerance is not None:
        picked = within_tolerance(values, n, tolerance=c.tolerance)
    else:
        picked = most_similar(torch.tensor(values, dtype=torch.float64), n)
    return [candidates[i] for i in picked]


def _structure(chosen: Sequence[tuple[str, str]]) -> dict[str, Any]:
    drop: dict[str, list[str]] = {}
    for kind, path in chosen:
        if kind != "block":
            drop.setdefault(kind, []).append(path)
    return {"drop": drop, "blocks": [path for kind, path in chosen if kind == "block"]}


def _as_branches(chosen: Sequence[tuple[str, str]], parts: Anatomy) -> dict[str, list[str]]:
    drop: dict[str, list[str]] = {}
    blocks = {b.path: b for b in parts.blocks}
    for kind, path in chosen:
        kinds = [s.kind for s in blocks[path].sublayers] if kind == "block" else [kind]
        for one in kinds:
            drop.setdefault(one, []).append(path)
    return drop


def _measured(found: Similarities, chosen: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {
        "similarity": found.branches,
        "block_similarity": found.blocks,
        "order": [f"{path} {kind}" for kind, path in chosen],
        "tokens": found.tokens,
    }
