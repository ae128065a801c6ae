"""The benchmark's record as text."""

from __future__ import annotations

from typing import Any

from manyheads.choose.bench.grid import DIRECTIONS, SDPA
from manyheads.choose.bench.lean import lean_text
from manyheads.choose.table import text_table
from manyheads.choose.units import show_bytes, show_rate, show_seconds

__all__ = ["bench_text"]


def bench_text(record: dict[str, Any]) -> str:
    """Return tables of the ratios, the special measurements and the targets."""
    m = record["machine"]
    parts = [
        f"{m['cpu']}, {m['threads']} threads, torch {m['torch']}, matrix products "
        f"{show_rate(m['matmul_flops'])}\nB=1, H=8, D=64, float32; {record['command']}; "
        f"{show_seconds(record['wall_seconds'])}"
    ]
    if record["quick"]:
        parts.append("quick: short lengths and few rounds, to see that it runs")
    for direction in DIRECTIONS:
        for what, words in (("train", "forward and backward"), ("forward", "forward")):
            parts.append(f"{direction}, {words}\n{_speed(record, direction, what)}")
    parts.append(_special(record["special"]))
    parts.append(
        "the targets are judged in a full run" if record["quick"] else _targets(record["targets"])
    )
    return "\n\n".join(part for part in parts if part)


def _speed(record: dict[str, Any], direction: str, what: str) -> str:
    rows = [r for r in record["rows"] if r["direction"] == direction and r["what"] == what]
    lengths = sorted({r["length"] for r in rows})
    summary = {
        s["mechanism"]: s
        for s in record["summary"]
        if s["direction"] == direction and s["what"] == what
    }
    cells = {(r["mechanism"], r["length"]): r for r in rows}
    table = []
    for name in dict.fromkeys(r["mechanism"] for r in rows):
        s = summary[name]
        exponent = "-" if s["exponent"] is None else f"{s['exponent']:.2f}"
        cross = "-" if name == SDPA else _cross(s)
        table.append([name, *(_cell(cells.get((name, n))) for n in lengths), exponent, cross])
    return text_table(["", *(f"{n:,}" for n in lengths), "exponent", "faster than SDPA"], table)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ratio = row["times_faster_than_sdpa"]
    text = show_seconds(row["median"])
    return text if ratio is None or row["mechanism"] == SDPA else f"{text} ({ratio:.2g}x)"


def _cross(summary: dict[str, Any]) -> str:
    if summary["faster_everywhere"]:
        return "everywhere"
    return "not yet" if summary["crossover"] is None else f"from {summary['crossover']:,.0f}"


def _special(special: dict[str, Any]) -> str:
    lines = []
    if gla := special.get("gla_against_reference"):
        lines.append(
            f"gla against its definition by the token at {gla['length']:,}: forward "
            f"{gla['forward']['times_faster']:.1f}x, forward and backward "
            f"{gla['train']['times_faster']:.1f}x"
        )
    rows = []
    for s in special["streaming"]:
        first, last = (t["median"] for t in s["seconds"])
        sizes = [show_bytes(b) for b in s["state_bytes"]]
        rows.append(
            (s["mechanism"], show_seconds(first), show_seconds(last), f"{s['time_ratio']:.2f}",
             "yes" if s["within_spread"] else "no", *sizes)
        )  # fmt: skip
    few, many = special["streaming"][0]["tokens"]
    header = ("one more token", f"after {few:,}", f"after {many:,}", "ratio", "within spread",
              f"state after {few:,}", f"after {many:,}")  # fmt: skip
    lines.append(text_table(header, rows))
    if bias := special.get("urpe_against_bias"):
        names = ("urpe over SDPA with a bias", "forward", "with backward", "bias with gradient")
        table = [
            (f"{r['length']:,}", f"{r['forward_ratio']:.2f}", f"{r['ratio']:.2f}",
             f"{r['ratio_bias_gradient']:.2f}")
            for r in bias
        ]  # fmt: skip
        lines.append(text_table(names, table))
    if memory := special.get("urpe_inference_memory"):
        figures = "; ".join(
            f"{d} {show_bytes(memory[d]['peak_bytes'])} (one square: "
            f"{show_bytes(memory[d]['square_bytes'])})"
            for d in DIRECTIONS
            if d in memory
        )
        lines.append(f"urpe without gradients at {memory['length']:,}: peak {figures}")
    if sla := special.get("sla_against_softmax"):
        lines.append(
            f"sla, 5 % of the blocks, against SDPA at {sla['length']:,}, one head of "
            f"{sla['head_dim']}: forward {sla['forward']['times_faster']:.1f}x, backward "
            f"{sla['backward']['times_faster']:.1f}x; largest tensor "
            f"{show_bytes(sla['largest_tensor_bytes'])} (one square: "
            f"{show_bytes(sla['square_bytes'])})"
        )
    if mamba := special.get("mamba_against_transformers"):
        lines.append(_mamba(mamba))
    lines += _sequences(special)
    if lean := special.get("lean_against_sdpa"):
        lines.append(lean_text(lean))
    if (kept := special.get("memory_kept", {})).get("rows"):
        head = ["memory kept", *(f"{n:,}" for n in kept["lengths"]), "exponent"]
        grown = [
            [
                f"{r['mechanism']} {r['direction']}",
                *map(show_seconds, r["seconds"]),
                f"{r['exponent']:.2f}",
            ]
            for r in kept["rows"]
        ]
        lines.append(
            "forward and backward with the C library told to keep freed memory (by default glibc\n"
            "gives blocks of 32 MB and more back at once and takes them again page by page)\n"
            + text_table(head, grown)
        )
    return "\n\n".join(lines)


def _mamba(found: dict[str, Any]) -> str:
    step = found["step"]
    seconds = [show_seconds(step["seconds"][n]["median"]) for n in ("step", "read", "products")]
    lines = [
        f"mamba, a token of the block: {seconds[0]}; a plain read of its weights and state "
        f"{seconds[1]} ({step['over_read']:.2f}x), its matrix products by torch {seconds[2]} "
        f"({step['over_products']:.2f}x)"
    ]
    rows = []
    for part in ("scan", "mixer"):
        for what, length in found["lengths"].items():
            if part not in found:
                continue
            f = found[part][what]
            times = [show_seconds(f["seconds"][n]["median"]) for n in ("ours", "theirs")]
            peaks = [show_bytes(f["peak_bytes"][n]) for n in ("ours", "theirs")]
            rows.append((f"{part}, {what} at {length:,}", *times, f"{f['times_faster']:.1f}x",
                         *peaks, f"{f['times_less_memory']:.1f}x"))  # fmt: skip
    head = ("mamba and transformers' loop", "ours", "theirs", "faster", "memory", "theirs", "less")
    return "\n".join([*lines, text_table(head, rows)]) if rows else lines[0]


def _sequences(special: dict[str, Any]) -> list[str]:
    lines = []
    if rows := special.get("long_sequences"):
        head = (f"forward and backward at {rows[0]['length']:,}", "time", "than SDPA", "exponent")
        table = [
            (
                r["form"],
                show_seconds(r["seconds"][r["form"]]["median"]),
                f"{r['times_faster']:.2g}x",
                f"{r['exponent']:.2f}",
            )
            for r in rows
        ]
        lines.append(text_table(head, table))
    if found := special.get("landmark_decode"):
        own, base = (show_seconds(found["seconds"][n]["median"]) for n in ("landmark", "sdpa"))
        lines.append(
            f"landmark, a token behind {found['cached']:,}: {own}, SDPA over the cache {base} "
            f"({found['times_faster']:.2g}x)"
        )
    if found := special.get("landmark_training"):
        lines.append(
            f"landmark, forward and backward at {found['length']:,}: {found['ratio']:.2f} times "
            "the time of causal SDPA"
        )
    if rows := special.get("model_decode"):
        few, many = rows[0]["contexts"]
        names = (f"one more token of {rows[0]['layers']} layers of {rows[0]['width']}", "batch",
                 f"behind {few:,}", f"behind {many:,}", "ratio", "softmax", "than softmax",
                 "than lean", "by what is read")  # fmt: skip
        table = [
            (
                r["mechanism"],
                str(r["batch"]),
                *(show_seconds(r["seconds"][n]["median"]) for n in ("few", "many")),
                f"{r['context_ratio']:.2f}",
                show_seconds(r["seconds"]["softmax"]["median"]),
                f"{r['times_faster']:.2g}x",
                f"{r['times_faster_than_lean']:.2g}x",
                f"{r['read_ratio']:.2g}x",
            )
            for r in rows
        ]
        lines.append(text_table(names, table))
    for r in special.get("quickened_decode", ()):
        plain, ours = (show_seconds(r["seconds"][n]["median"]) for n in ("plain", "quickened"))
        lines.append(
            f"a token of {r['model']} of transformers, {r['layers']} layers of {r['width']}, "
            f"batch {r['batch']}: {plain}, quickened {ours} ({r['times_faster']:.2f}x)"
        )
    return lines


def _targets(targets: list[dict[str, Any]]) -> str:
    rows = []
    for t in targets:
        bound = f"{'>=' if t['at_least'] else '<='} {t['bound']:g}{_unit(t['unit'])}"
        measured = "never" if t["met"] is False else "-"
        if t["measured"] is not None:
            measured = f"{t['measured']:.3g}{_unit(t['unit'])}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[t["met"]]
        rows.append((t["what"], bound, measured, verdict))
    return text_table(("target", "aim", "measured", "verdict"), rows)


def _unit(unit: str) -> str:
    return unit if unit in ("", "x") else f" {unit}"
