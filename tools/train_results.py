"""Train the models whose figures the documentation quotes; one JSON a run in results/train.

Give names to train some alone, and ``--work DIR`` to keep the runs there: one that was interrupted
goes on. What is measured is quality: other work on the machine costs time and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from manyheads.cli import main as manyheads

FOLDER = Path(__file__).resolve().parent.parent / "results" / "train"
DIGITS = (
    '{"depths": [1, 1, 1], "embed_dims": [32, 64, 128], "mlp_ratios": [4, 4, 4], '
    '"mixers": ["pool", "pool", "attention"], "patch": [3, 2, 1], "layer_scale": null, '
    '"norm": "channel", "positions": 2}'
)
# Six layers of width 192 on the King James Bible, those of softmax with the same text, order and
# steps. kjv-masa and the three after it have a third of kjv-softmax's attention parameters.
TEXT = (
    "lm --data builtin:kjv --embed-dim 192 --num-heads 6 --length 256 --batch-size 8 "
    "--steps 1000 --threads 1 --mixers"
)
THIRD = "--share-attention 2"
RUNS = {
    "digits": "vision --data builtin:digits --model metaformer_s12 --image-size 32 --steps 1500 "
    f"--ema 0.99 --threads 1 --model-options '{DIGITS}'",
    "minilm": "distil --threads 2",
    "kjv-softmax": f"{TEXT} softmax*6",
    "kjv-masa": f"{TEXT} softmax*6 {THIRD}",
    "kjv-grouped": f"{TEXT} softmax*6 --mixer-options "
    '\'{"softmax": {"num_kv_heads": 2, "head_dim": 16}}\'',
    "kjv-low-rank": f'{TEXT} softmax*6 {THIRD} --sharing \'{{"kind": "low-rank"}}\'',
    "kjv-repeat": f'{TEXT} softmax*6 {THIRD} --sharing \'{{"kind": "repeat"}}\'',
    "kjv-mamba": f"{TEXT} mamba*6".replace("--steps 1000", "--steps 500"),
    "recall-softmax": "recall --mixers softmax*2 --threads 1",
}


def main() -> int:
    """Train what was named, or all; a run that fails is said and the next goes on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*RUNS, []])
    parser.add_argument("--work", type=Path, help="folder of the runs (default: thrown away)")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in given.names or RUNS:
            run = (given.work or Path(scratch)) / name
            print(f"manyheads train {RUNS[name]}", file=sys.stderr)
            code = manyheads(["train", *shlex.split(RUNS[name]), "--out", str(run)])
            if code >= 128:  # a signal: whoever sent it does not want the next run
                return code
            if code:
                failed.append(name)
                continue
            record = json.loads((run / "results.json").read_text())
            record["command"] = f"manyheads train {RUNS[name]}"
            for place in (record.get("options", {}), record):
                place.pop("out", None)
            record.pop("hint", None)
            (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
