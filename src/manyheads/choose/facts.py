"""The verb ``list``: mechanisms and their facts, from the registry alone."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass, field
from typing import Any

from manyheads.config import Config
from manyheads.errors import unknown_name

__all__ = ["ListOptions", "facts", "run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListOptions(Config):
    """Which mechanisms to show.

    Attributes:
        glob: a name, shown in full, or a pattern such as "g*" (none: all)
        json: print JSON
    """

    glob: str = field(default="*", metadata={"positional": True})
    json: bool = False


def run(options: ListOptions) -> int:
    """Print the table of the mechanisms that match, or everything about one.

    Raises:
        ValueError: nothing matches.
    """
    from manyheads.registry import list_mechanisms

    names = list_mechanisms(options.glob)
    if not names:
        raise unknown_name("mechanism", options.glob, list_mechanisms())
    found = [facts(name) for name in names]
    if options.json:
        print(json.dumps(found, indent=2))
    elif names == [options.glob]:
        print(_card(found[0]))
    else:
        print(_table(found))
    return 0


def facts(name: str) -> dict[str, Any]:
    """Return what the registry says of a mechanism, as plain JSON types."""
    from manyheads.registry import Shape, get_mechanism

    m = get_mechanism(name)
    shape = Shape(batch=1, heads=1, length=4096, head_dim=64, is_causal=m.causal)
    return {
        "name": m.name,
        "summary": m.summary,
        "paper": m.paper,
        "causal": m.causal,
        "bidirectional": m.bidirectional,
        "cross": m.cross,
        "decodes": m.step is not None,
        "constant_state": m.constant_state,
        "state_numbers": m.state_numbers(shape) if m.step is not None else None,
        "flops": m.flops(shape),
        "positional": m.positional,
        "geometry": m.geometry,
        "exact": m.exact,
        "cost": m.cost,
        "function": f"manyheads.attention.{m.function.__name__}",
        "module": f"manyheads.attention.{m.module.__name__}",
        "notes": list(m.notes),
    }


def _table(found: list[dict[str, Any]]) -> str:
    from manyheads.choose.table import text_table

    header = ("name", "direction", "state", "places", "exact", "cost of a pass", "paper")
    rows = [
        (
            f["name"],
            _direction(f),
            _state(f),
            "own" if f["positional"] else "outside",
            "yes" if f["exact"] else "no",
            f["cost"],
            f["paper"] or "-",
        )
        for f in found
    ]
    lines = [text_table(header, rows, left=len(header)), ""]
    width = max(len(f["name"]) for f in found)
    for f in found:
        lines.append(
            textwrap.fill(
                f"{f['name']:<{width}}  {f['summary']}", 98, subsequent_indent=" " * (width + 2)
            )
        )
    lines += [
        "",
        "direction: both = bidirectional, a token sees all; cross = queries and keys that differ.",
        "state: numbers for decoding, per head of 64 after 4,096 tokens. places: outside = the",
        "model must add them. exact: softmax attention itself, not another function.",
        "One in full: manyheads list NAME. Measured on this machine: manyheads choose.",
    ]
    return "\n".join(lines)


def _direction(f: dict[str, Any]) -> str:
    words = {"causal": "causal", "bidirectional": "both", "cross": "cross"}
    return " ".join(word for use, word in words.items() if f[use])


def _state(f: dict[str, Any]) -> str:
    if not f["decodes"]:
        return "-"
    kind = "fixed" if f["constant_state"] else "grows"
    return f"{kind}, {f['state_numbers']:,}"


def _card(f: dict[str, Any]) -> str:
    from manyheads.choose.units import show_count

    state = f"with a state: {_state(f)} numbers a head" if f["decodes"] else "no"
    lines = [
        f"{f['name']}: {f['summary']}",
        "",
        f"direction    {_direction(f)}",
        f"decodes      {state}",
        f"positions    {'its own' if f['positional'] else 'the model must add them'}",
        f"exact        {'softmax attention' if f['exact'] else 'no: a layer needs training'}",
        f"tokens lie   on a {f['geometry']}",
        f"a pass       {f['cost']}; {show_count(f['flops'])}FLOP a head of 64 at 4,096 tokens",
        f"function     {f['function']}",
        f"module       {f['module']}",
    ]
    if f["paper"]:
        lines.append(f"paper        manyheads papers {f['paper']}")
    lines += [f"note         {note}" for note in f["notes"]]
    return "\n".join(lines)
