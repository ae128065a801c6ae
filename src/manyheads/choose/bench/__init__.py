"""The verb ``bench``: every mechanism against torch's own softmax attention, in one run.

B=1, H=8, D=64, float32. At each length and direction all mechanisms and
``scaled_dot_product_attention`` take turns; what is compared was measured in the same rounds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyheads.config import Config
from manyheads.errors import require_extra

__all__ = ["BenchOptions", "measure", "run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions(Config):
    """Options of `manyheads bench`.

    Attributes:
        out: the JSON to write; "none" writes nothing (default: results/bench.json, with --vision
          results/vision.json)
        vision: backbones on images instead of mechanisms: against timm, two sizes, ONNX Runtime
        quick: short lengths and few rounds, to see that everything runs: its figures mean little
        threads: threads inside operators (0: as torch decides)
        seed: of the inputs
    """

    out: str | None = None
    vision: bool = False
    quick: bool = False
    threads: int = 0
    seed: int = 0


def run(options: BenchOptions) -> int:
    """Measure, print the tables and the targets, write the JSON. 0 also where targets are missed.

    Raises:
        ValueError: the file cannot be written; before any work.
        MissingExtraError: rich is not installed.
    """
    require_extra("rich", "choose", "manyheads bench")
    from manyheads.choose.bench.text import bench_text
    from manyheads.choose.bench.vision import vision_text
    from manyheads.choose.verb import progress_bar

    name = options.out or f"results/{'vision' if options.vision else 'bench'}.json"
    out = None if name == "none" else Path(name)
    if out is not None:
        _check_writable(out)
    with progress_bar() as show:
        record = measure(options, progress=show)
    print(vision_text(record) if options.vision else bench_text(record), flush=True)
    if out is not None:
        draft = out.with_name(out.name + ".part")
        draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.replace(out)
        print(f"\nwritten: {out}")
    return 0


def measure(options: BenchOptions, *, progress: Any = None) -> dict[str, Any]:
    """Run the benchmark and return its record, plain JSON types.

    Args:
        options: what to run.
        progress: called as ``progress(share, text)``.
    """
    import time

    from manyheads.choose.bench.grid import measure_grid, summarise
    from manyheads.choose.bench.special import measure_special
    from manyheads.choose.bench.targets import judge
    from manyheads.choose.bench.vision import measure_vision
    from manyheads.choose.machine import machine_facts, matmul_rate, set_threads
    from manyheads.choose.run import default_threads

    tell = progress or (lambda share, text: None)
    begin = time.perf_counter()
    with set_threads(options.threads or default_threads()):
        machine = machine_facts() | {"matmul_flops": matmul_rate()}
        if options.vision:
            found = measure_vision(quick=options.quick, seed=options.seed, progress=tell)
            return _head(options, machine, begin) | {"vision": found}
        rows = measure_grid(
            quick=options.quick, seed=options.seed, progress=lambda s, t: tell(0.8 * s, t)
        )
        special = measure_special(
            quick=options.quick, seed=options.seed, progress=lambda s, t: tell(0.8 + 0.2 * s, t)
        )
    summary = summarise(rows)
    return _head(options, machine, begin) | {
        "shape": {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32"},
        "targets": judge(summary, special),
        "summary": summary,
        "special": special,
        "rows": rows,
    }


def _head(options: BenchOptions, machine: dict[str, Any], begin: float) -> dict[str, Any]:
    """Return what every record says of its run; ``begin`` is on ``time.perf_counter``."""
    import time
    from datetime import UTC, datetime

    from manyheads._version import __version__

    flags = (" --vision" if options.vision else "") + (" --quick" if options.quick else "")
    return {
        "schema": 1,
        "kind": "manyheads.bench",
        "version": __version__,
        "command": "manyheads bench" + flags,
        "date": datetime.now(UTC).date().isoformat(),
        "quick": options.quick,
        "seed": options.seed,
        "machine": machine,
        "wall_seconds": time.perf_counter() - begin,
    }


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise ValueError(
            f"out {str(path)!r} cannot be written ({error.strerror or error}): "
            "give another file with --out"
        ) from None
