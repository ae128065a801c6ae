"""Run `manyheads shrink` on the real models that packages ship; one JSON a run in results/shrink.

Give names to run some alone. Nothing else should run on the machine.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from manyheads.cli import main as manyheads

FOLDER = Path(__file__).resolve().parent.parent / "results" / "shrink"
MINILM = "builtin:minilm --calibrate builtin:kjv --evaluate builtin:lee"
VERSES = "builtin:minilm --calibrate builtin:kjv --evaluate builtin:verses"
WHISPER = "builtin:whisper --calibrate builtin:librivox --evaluate builtin:librivox"
PROMPTS = "builtin:whisper --calibrate builtin:librivox --evaluate builtin:prompts"
RUNS = {
    "minilm-attention": f"{MINILM} --method llm-drop --set attention=0 --budget quality=0.05",
    "minilm-blocks": f"{MINILM} --method llm-drop --set blocks=0 --budget quality=0.05",
    "minilm-verses": f"{VERSES} --method llm-drop --set attention=0 --budget quality=0.05",
    "minilm-int8": f"{MINILM} --method int8",
    "minilm-int8-static": f"{MINILM} --method int8 --set inputs=static",
    "minilm-int8-clipped": f"{MINILM} --method int8 --set inputs=static --set percentile=99.99",
    "whisper-a2sf": f"{WHISPER} --method a2sf --set budget_tokens=6",
    "whisper-h2o": f"{WHISPER} --method h2o --set budget_tokens=6",
    "whisper-sink-recent": f"{WHISPER} --method sink-recent --set budget_tokens=6",
    "whisper-cross-a2sf": f"{WHISPER} --method a2sf --set cross_budget=375",
    "whisper-cross-h2o": f"{WHISPER} --method h2o --set cross_budget=375",
    "whisper-attention": f"{WHISPER} --method llm-drop --drop-attention 1",
    "whisper-mlp": f"{WHISPER} --method llm-drop --drop-mlp 1",
    "whisper-int8": f"{WHISPER} --method int8",
    "whisper-attention-prompts": f"{PROMPTS} --method llm-drop --drop-attention 1",
    "whisper-int8-prompts": f"{PROMPTS} --method int8",
}


def main() -> int:
    """Run what was named, or all; a run that fails is said and the next goes on."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in sys.argv[1:] or RUNS:
        words = RUNS[name].split()
        out = io.StringIO()
        print(f"manyheads shrink {' '.join(words)}", file=sys.stderr)
        with contextlib.redirect_stdout(out):
            code = manyheads(["shrink", *words, "--json"])
        if code not in (0, 1) or not out.getvalue():
            failed.append(name)
            continue
        record = {"command": f"manyheads shrink {' '.join(words)}", **json.loads(out.getvalue())}
        (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(record["answer"])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
