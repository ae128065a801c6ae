"""The verbs ``papers`` and ``claims``."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.papers.index import PAPERS, get_paper, is_in

__all__ = ["ClaimsOptions", "PapersOptions", "claims", "papers", "render", "run_claim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PapersOptions(Config):
    """Which papers to show.

    Attributes:
        slug: a paper to show in full, or a pattern such as "*former" to list; none: all.
    """

    slug: str | None = field(default=None, metadata={"positional": True})


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimsOptions(Config):
    """Which claims to measure and where to put the figures.

    Attributes:
        slugs: papers whose claims are measured, one after the other (none: all in the library).
        out: folder for one JSON a paper; "none" writes nothing.
        threads: threads to measure with (0: as many as this process may use).
    """

    slugs: tuple[str, ...] = field(default=(), metadata={"positional": True})
    out: str = "results/claims"
    threads: int = 0


def papers(options: PapersOptions) -> int:
    """Print the list of papers, or one card."""
    slug = options.slug
    if slug is not None and not any(c in slug for c in "*?["):
        print(_card(slug))
        return 0
    shown = [e for e in PAPERS if slug is None or fnmatchcase(e.slug, slug)]
    if not shown:
        raise unknown_name("paper", str(slug), [e.slug for e in PAPERS])
    width = max(len(e.slug) for e in shown)
    for entry in sorted(shown, key=lambda e: (not is_in(e.slug), e.slug)):
        state = "in" if is_in(entry.slug) else "not yet"
        print(f"{entry.slug:<{width}}  {state:<7}  {entry.arxiv:<10}  {entry.system}")
    print(f"\n{sum(is_in(e.slug) for e in shown)} of {len(shown)} are in the library")
    return 0


def _card(slug: str) -> str:
    known = {e.slug: e for e in PAPERS}
    if slug in known and not is_in(slug):
        entry = known[slug]
        return f"{entry.system} (arXiv {entry.arxiv})\nnot in the library yet; home: {entry.home}"
    paper = get_paper(slug)
    lines = [f"{paper.title} (arXiv {paper.arxiv})", ""]
    lines += textwrap.wrap(paper.summary, 96)
    if paper.reconstruction:
        lines += ["", "A reconstruction from the paper: no official code could be had."]
    lines += ["", "claim", *textwrap.wrap(paper.claim.statement, 92, initial_indent="  ",
                                           subsequent_indent="  ")]  # fmt: skip
    lines += ["here", *(f"  {name}" for name in paper.implements)]
    if paper.recipe:
        lines += ["train", f"  {paper.recipe}"]
    return "\n".join([*lines, "measure", f"  manyheads claims {paper.slug}"])


def claims(options: ClaimsOptions) -> int:
    """Measure claims, print claimed and measured side by side, and write one JSON a paper.

    Returns 0 if every claim held in direction, 1 otherwise.
    """
    slugs = list(options.slugs) or [e.slug for e in PAPERS if is_in(e.slug)]
    cards = [get_paper(slug) for slug in slugs]
    out = None if options.out == "none" else Path(options.out)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write to {options.out!r}: {error.strerror}") from None
    held = True
    for paper in cards:
        record = run_claim(paper.slug, threads=options.threads)
        held = held and all(c["direction"] for c in record["checks"])
        print(render(record), flush=True)
        if out is not None:
            (out / f"{paper.slug}.json").write_text(json.dumps(record, indent=2) + "\n")
    return 0 if held else 1


def run_claim(slug: str, *, threads: int = 0) -> dict[str, Any]:
    """Measure one claim and return its record: checks, figures, machine, versions, wall time."""
    import torch

    from manyheads._version import __version__
    from manyheads.choose.machine import machine_facts, set_threads, usable_cores

    paper = get_paper(slug)
    interactive = sys.stderr.isatty()
    started = time.perf_counter()

    def progress(text: str) -> None:
        seconds = time.perf_counter() - started
        end, clear = ("", "\r\x1b[K") if interactive else ("\n", "")
        print(f"{clear}{slug} [{seconds:4.0f} s] {text}", end=end, file=sys.stderr, flush=True)

    with set_threads(threads or usable_cores()):
        torch.manual_seed(0)
        measurement = paper.claim.measure(progress)
        facts = machine_facts()
    if interactive:
        print("\r\x1b[K", end="", file=sys.stderr)
    return {
        "schema": 1,
        "paper": slug,
        "claim": paper.claim.statement,
        **measurement.to_dict(),
        "command": f"manyheads claims {slug}",
        "version": __version__,
        "wall_seconds": round(time.perf_counter() - started, 1),
        "machine": facts,
    }


def render(record: dict[str, Any]) -> str:
    """Return a claim's record as text: what, claimed, measured, and whether it held."""
    rows = [("", "claimed", "measured here", "direction", "size")]
    for check in record["checks"]:
        unit = check["unit"]
        measured = f"{check['measured']:.4g}{'' if unit == 'x' else ' '}{unit}".rstrip()
        if check["bound"]:
            measured += f" ({check['bound']})"
        marks = ("yes" if check["direction"] else "NO", "yes" if check["size"] else "NO")
        rows.append((check["what"], check["claimed"], measured, *marks))
    wrapped = [[textwrap.wrap(c, w) or [""] for c, w in zip(r, (40, 28, 34, 9, 4), strict=True)]
               for r in rows]  # fmt: skip
    widths = [max(len(line) for row in wrapped for line in row[i]) for i in range(5)]
    lines = [f"{record['paper']}: {record['claim']}", ""]
    for row in wrapped:
        for i in range(max(map(len, row))):
            cells = [c[i] if i < len(c) else "" for c in row]
            pairs = zip(cells, widths, strict=True)
            lines.append("  " + "  ".join(f"{c:<{w}}" for c, w in pairs).rstrip())
    lines += [f"  note: {note}" for note in record.get("notes", ())]
    machine = record["machine"]
    lines.append(
        f"  {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{record['wall_seconds']:.0f} s"
    )
    return "\n".join(lines) + "\n"
