"""Write the README's tables from results/ and the list of papers; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from manyheads.choose.results import Results
from manyheads.choose.table import cost_cells, describe
from manyheads.choose.units import show_seconds
from manyheads.choose.workload import Workload
from manyheads.papers import PAPERS, is_in

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "results"


def main() -> int:
    """Rewrite the marked sections; with --check return 1 if they are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if stale")
    check = parser.parse_args().check
    old = README.read_text(encoding="utf-8")
    new = old
    for name, make in SECTIONS.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        if not re.search(pattern, new, flags=re.DOTALL):
            print(f"README.md has no section {name}", file=sys.stderr)
            return 1
        text = make()
        new = re.sub(pattern, lambda m, t=text: m[1] + t + m[2], new, flags=re.DOTALL)
    if new == old:
        return 0
    if check:
        print("README.md is not what results/ says: run make readme", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


def choose_section() -> str:
    """The default run: recommendation, picture, table."""
    if not (RESULTS / "choose" / "results.json").is_file():
        return ""
    results = Results.load(RESULTS / "choose")
    answer = results.answer
    if answer is None or answer.best is None:
        raise ValueError("results/choose holds no recommendation: run make choose first")
    header, rows, notes = cost_cells(results)
    machine = results.machine
    seconds = sum(s["seconds"] for s in results.sessions)
    budget = results.workload.budget
    is_default = budget == Workload.__dataclass_fields__["budget"].default
    command = "`make choose`" if is_default else f"`manyheads choose --budget {budget:g}s`"
    lines = [
        f"What {command} printed on "
        f"{machine['cpu']} with {machine['threads']} threads "
        f"(torch {machine['torch']}, {show_seconds(seconds)}; "
        f"{describe(results.workload)}):",
        "",
        f"> **Recommended: {answer.best}.** {' '.join(answer.reasons)}",
        "",
        "![time against length, one line a mechanism](results/choose/time.png)",
        "",
        *markdown(header, rows),
        "",
        f"{notes}.",
        "",
    ]
    if answer.loses:
        lines += ["It also says where its choice loses:", ""]
        lines += [f"- {line}" for line in answer.loses] + [""]
    return "\n".join(lines)


def bench_section() -> str:
    """The targets of the benchmark and what was measured."""
    if not (RESULTS / "bench.json").is_file():
        return "Not measured yet: `manyheads bench` writes results/bench.json.\n"
    record = read("bench.json")
    machine = record["machine"]
    rows = []
    for target in record["targets"]:
        unit = target["unit"] if target["unit"] in ("", "x") else f" {target['unit']}"
        aim = f"{'≥' if target['at_least'] else '≤'} {target['bound']:g}{unit}"
        value = target["measured"]
        measured = "never" if value is None else f"{value:.3g}{unit}"
        verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
        rows.append([target["what"], aim, measured, verdict])
    lines = [
        f"`manyheads bench`: one interleaved run against torch's scaled_dot_product_attention "
        f"(SDPA), B=1, H=8, D=64, float32, {machine['threads']} threads on {machine['cpu']}, torch "
        f"{machine['torch']}. Times are in [results/bench.json](results/bench.json).",
        "",
        *markdown(["what", "aim", "measured", ""], rows, left=1),
        "",
    ]
    return "\n".join(lines)


def shrink_section() -> str:
    """What `manyheads shrink` made of real models, a row a result."""
    rows = []
    records = [json.loads(p.read_text()) for p in sorted((RESULTS / "shrink").glob("*.json"))]
    # Results of methods that act on no cache do not say what it holds.
    caches = any(r["rows"][0]["quality"].get("cache_bytes") for r in records)
    for record in records:
        first, *others = record["rows"]
        for row in others:
            quality, before = row["quality"], first["quality"]
            rows.append(
                [
                    record["model"].removeprefix("builtin:"),
                    row["name"],
                    record["data"]["judged on"].removeprefix("builtin:"),
                    *(f"{100 * row[k] / first[k]:.0f} %" for k in _SHARES),
                    *([_cache_share(quality, before)] if caches else []),
                    f"{quality['name']}: {before['value']:.3f} → {quality['value']:.3f}",
                ]
            )
    if not rows:
        return "Not measured yet: `python tools/shrink_results.py` writes results/shrink.\n"
    header = ["model", "method", "judged on", "parameters", "bytes", "time", "quality"]
    if caches:
        header.insert(-1, "cache")
    return "\n".join([*markdown(header, rows, left=3), ""])


def _cache_share(quality: dict[str, Any], before: dict[str, Any]) -> str:
    held, whole = quality.get("cache_bytes"), before.get("cache_bytes")
    return f"{100 * held / whole:.0f} %" if held is not None and whole else ""


_SHARES = ("parameters", "weight_bytes", "forward_ms")


def trained_section() -> str:
    """What `manyheads train` reached, a row a run."""
    rows = []
    for path in sorted((RESULTS / "train").glob("*.json")):
        record = json.loads(path.read_text())
        figures = record["figures"]
        shown = [f"{words} {figures[k]:.4g}" for k, words in _FIGURES.items() if k in figures]
        rows.append([path.stem, record["title"], ", ".join(shown)])
    if not rows:
        return "Not measured yet: `python tools/train_results.py` writes results/train.\n"
    return "\n".join([*markdown(["run", "what was trained", "held out"], rows, left=3), ""])


_FIGURES = {
    "test_accuracy": "accuracy",
    "accuracy": "accuracy",
    "bits_per_byte": "bits per byte",
    "valid_cosine": "cosine to the teacher",
    "teacher_spearman": "Spearman on Lee of the teacher",
    "spearman": "of the student",
}


def claims_section() -> str:
    """Claimed and measured, a row a check."""
    rows = []
    for path in sorted((RESULTS / "claims").glob("*.json")):
        record = json.loads(path.read_text())
        for check in record["checks"]:
            unit = check["unit"] if check["unit"] in ("", "x") else f" {check['unit']}"
            bound = f" ({check['bound']})" if check["bound"] else ""
            measured = f"{check['measured']:.4g}{unit}{bound}"
            marks = ["yes" if check[k] else "**no**" for k in ("direction", "size")]
            rows.append([record["paper"], check["what"], check["claimed"], measured, *marks])
    if not rows:
        return "Not measured yet: `manyheads claims` writes results/claims.\n"
    header = ["paper", "what", "claimed", "measured here", "direction", "size"]
    return "\n".join([*markdown(header, rows, left=6), ""])


def papers_section() -> str:
    """The 47 papers and their state."""
    ordered = sorted(PAPERS, key=lambda e: (not is_in(e.slug), e.slug))
    rows = [
        [
            f"`{e.slug}`",
            f"[{e.arxiv}](https://arxiv.org/abs/{e.arxiv})",
            e.system,
            e.home,
            "in" if is_in(e.slug) else "not yet",
        ]
        for e in ordered
    ]
    count = sum(is_in(e.slug) for e in PAPERS)
    header = ["slug", "arXiv", "system", "home", "state"]
    lead = f"{count} of {len(PAPERS)} are in; `manyheads papers SLUG` shows a card."
    return "\n".join([lead, "", *markdown(header, rows, left=5), ""])


def markdown(header: list[str], rows: list[list[str]], *, left: int = 1) -> list[str]:
    """Return a table as lines of Markdown; columns after the first ``left`` stand right."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def read(name: str) -> dict[str, Any]:
    """Return a record below results/."""
    return json.loads((RESULTS / name).read_text())


SECTIONS = {
    "choose": choose_section,
    "bench": bench_section,
    "trained": trained_section,
    "shrink": shrink_section,
    "claims": claims_section,
    "papers": papers_section,
}


if __name__ == "__main__":
    sys.exit(main())
