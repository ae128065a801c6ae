"""Run `manyheads shrink` on real models; one JSON a run in results/shrink.

The models are those that packages ship, and with ``--runs DIR`` those that
``tools/train_results.py --work DIR`` trained. Give names to run some alone. Nothing else should
run on the machine.
"""

from __future__ import annotations

import argparse
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
KJV = "--calibrate builtin:kjv --evaluate builtin:kjv --samples 64 --length 256"
CACHED = f"runs/kjv-softmax {KJV}"
RECALL = "runs/recall-softmax --evaluate builtin:recall --samples 256"
# A quarter of the text in the cache: of 256 tokens, and of the 64 of a sequence of pairs.
POLICIES = {
    "a2sf": "a2sf",
    "a2sf-slow": "a2sf --set alpha=0.9",
    "h2o": "h2o",
    "streaming": "streaming",
}
TRAINED = {
    "student-int8": "runs/minilm/student --calibrate builtin:kjv --evaluate builtin:verses "
    "--method int8",
    "kjv-mamba-quamba": f"runs/kjv-mamba {KJV} --method quamba",
    "kjv-mamba-naive": f"runs/kjv-mamba {KJV} --method quamba --set percentile=null "
    "--set hadamard=false",
    "kjv-mamba-clipped": f"runs/kjv-mamba {KJV} --method quamba --set hadamard=false",
    "kjv-mamba-rotated": f"runs/kjv-mamba {KJV} --method quamba --set percentile=null",
    **{f"kjv-{n}": f"{CACHED} --method {m} --set budget_tokens=64" for n, m in POLICIES.items()},
    **{f"recall-{n}": f"{RECALL} --method {m} --set budget_tokens=16"
       for n, m in POLICIES.items()},
}  # fmt: skip
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*RUNS, *TRAINED, []])
    parser.add_argument("--runs", type=Path, help="folder of the trained models")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in given.names or (*RUNS, *(TRAINED if given.runs else ())):
        command = (RUNS | TRAINED)[name]
        if name in TRAINED and given.runs is None:
            parser.error(f"{name} is of a trained model: train it with tools/train_results.py "
                         "--work DIR, then give --runs DIR")  # fmt: skip
        words = [str(given.runs / w[5:]) if w.startswith("runs/") else w for w in command.split()]
        out = io.StringIO()
        print(f"manyheads shrink {command}", file=sys.stderr)
        with contextlib.redirect_stdout(out):
            code = manyheads(["shrink", *words, "--json"])
        if code not in (0, 1) or not out.getvalue():
            failed.append(name)
            continue
        found = json.loads(out.getvalue().replace(str(given.runs), "runs"))
        record = {**found, "command": f"manyheads shrink {command}"}
        (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(record["answer"])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
