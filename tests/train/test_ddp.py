"""Two processes over gloo are one process with the same batch, to rounding."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyheads.cli import main
from manyheads.train.checkpoint import read_checkpoint
from train.compare_runs import assert_equal_to_rounding, assert_equal_to_the_bit
from train.conftest import tiny_flags

FOUR = ("--batch-size", "4", "--learning-rate", "3e-3")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def command(text: Path, *words: str) -> list[str]:
    return ["train", "lm", "--data", str(text), *tiny_flags(), *FOUR, *words]


def test_two_processes_are_one(train_lm, text, tmp_path, capfd) -> None:
    train_lm("--out", "one", *FOUR, "--accumulate", 2)
    capfd.readouterr()
    assert main(command(text, "--out", "two", "--devices", "2")) == 0
    shown = capfd.readouterr()
    assert shown.out.count("bits per byte") == 1
    assert shown.err.count("step      3") == 1
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")
    tensors, state = read_checkpoint(tmp_path / "two" / "checkpoint.safetensors")
    assert state["processes"] == 2
    assert len(tensors["rng.torch"]) == 2
    assert not bool((tensors["rng.torch"][0] == tensors["rng.torch"][1]).all())


def test_errors_of_the_writing_process_end_all(train_lm, text, tmp_path, capfd) -> None:
    # Seen by the first process alone, once the processes run: the folder's lock is held.
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(command(text, "--out", "run", "--devices", "2")) == 2
    assert "another process is training" in capfd.readouterr().err


@pytest.mark.slow
def test_torchrun(train_lm, text, tmp_path) -> None:
    train_lm("--out", "one", *FOUR)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["-m", "manyheads.cli", *command(text, "--out", "two")]
    done = subprocess.run(run, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits per byte") == 1
    assert_equal_to_rounding(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_ctrl_c_and_the_same_processes_go_on_to_the_bit(train_lm, text, tmp_path, capfd) -> None:
    long = ("--steps", "150", "--eval-every", "75", "--save-every", "10", "--dropout", "0.1")
    words = command(text, *long, "--devices", "2", "--out", "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "manyheads.cli", *words],
        env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    deadline = time.monotonic() + 240
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    # As a terminal does, to every process of the group.
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, shown = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    assert "manyheads train lm --resume run" in shown
    assert 10 <= read_checkpoint(checkpoint)[1]["step"] < 150
    assert main(["train", "lm", "--resume", "run"]) == 0
    assert main(command(text, *long, "--devices", "2", "--out", "whole")) == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")
