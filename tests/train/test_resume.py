"""Stopped in whatever way, a run goes on to the same bits as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyheads.cli import main
from manyheads.data import TokenBatches
from manyheads.train import loop
from manyheads.train.checkpoint import read_checkpoint
from train.compare_runs import assert_equal_to_the_bit, figures, metrics
from train.conftest import tiny_flags

# Dropout uses the generators, parts the sampler; 3 and 7 put checkpoints between evaluations.
LONG = (
    "--steps", "80", "--dropout", "0.1", "--batch-size", "4", "--accumulate", "2",
    "--save-every", "3", "--eval-every", "7",
)  # fmt: skip


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act) -> None:
    """Call ``act`` while the batch of that step is being made."""
    usual = TokenBatches.batch

    def batch(self, number: int):
        if number == step:
            act()
        return usual(self, number)

    monkeypatch.setattr(TokenBatches, "batch", batch)


def test_killed_with_sigkill(train_lm, text, tmp_path) -> None:
    train_lm("--out", "whole", *LONG)
    command = [sys.executable, "-m", "manyheads.cli", "train", "lm", "--data", str(text)]
    command += [*tiny_flags(), *LONG, "--out", "killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "checkpoint.safetensors"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    step = read_checkpoint(checkpoint)[1]["step"]
    assert 0 < step < 80
    assert not (tmp_path / "killed" / "results.json").exists()
    # The same command goes on.
    assert train_lm("--out", "killed", *LONG) == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("step", [1, 12, 29])
def test_interrupted_by_the_user(train_lm, tmp_path, monkeypatch, capsys, step) -> None:
    train_lm("--out", "whole", "--steps", 15, "--eval-every", 6)
    with monkeypatch.context() as patch:
        at_step(patch, step // 2, lambda: signal.raise_signal(signal.SIGINT))
        assert train_lm("--out", "run", "--steps", 15, "--eval-every", 6) == 130
    shown = capsys.readouterr().err
    assert f"stopped after step {step // 2 + 1} of 15, all is saved" in shown
    assert "manyheads train lm --resume run" in shown
    assert main(["train", "lm", "--resume", "run"]) == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_saves_too(train_lm, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        assert train_lm("--out", "run") == 143
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 5


def test_interrupted_during_an_evaluation(train_lm, tmp_path, monkeypatch) -> None:
    train_lm("--out", "whole")
    usual, calls = loop.evaluating, []

    def evaluating(*arguments):
        calls.append(1)
        if len(calls) in (2, 3):
            signal.raise_signal(signal.SIGINT)
        return usual(*arguments)

    monkeypatch.setattr("manyheads.train.lm.evaluating", evaluating)
    # Once in the second evaluation, once in the same again, once in the final one.
    assert train_lm("--out", "run") == 130
    assert train_lm("--out", "run") == 130
    assert [r["step"] for r in metrics(tmp_path / "run")] == ["2", "3", "4", "6"]
    assert train_lm("--out", "run") == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")


def test_a_second_ctrl_c_quits_at_once(train_lm, tmp_path, monkeypatch, capsys) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    train_lm("--out", "whole")
    with monkeypatch.context() as patch:
        at_step(patch, 4, twice)
        assert train_lm("--out", "run") == 130
    assert read_checkpoint(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 3
    assert train_lm("--out", "run") == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    train_lm, tmp_path, monkeypatch, capsys
) -> None:
    from manyheads.train import checkpoint

    train_lm("--out", "whole")
    usual, calls = checkpoint.save_file, []

    def save_file(tensors, path, header) -> None:
        calls.append(1)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        usual(tensors, path, header)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file)
        capsys.readouterr()
        assert train_lm("--out", "run", "--no-progress") == 2
    shown = capsys.readouterr().err
    assert "No space left on device" in shown
    assert shown.count("\n") == 1
    assert train_lm("--out", "run") == 0
    assert_equal_to_the_bit(tmp_path / "whole", tmp_path / "run")


def stop_at(train_lm, monkeypatch, step: int, *words) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGINT))
        assert train_lm(*words) == 130


def test_rows_that_will_come_again_are_dropped(train_lm, tmp_path, monkeypatch) -> None:
    train_lm("--out", "whole")
    stop_at(train_lm, monkeypatch, 3, "--out", "run")
    # As if it had been killed later, while a row was being written.
    log = tmp_path / "run" / "metrics.csv"
    log.write_text(log.read_text() + "5,1.0,0.1,0.1,9,9,\n6,,,,,,7.1\n6,1.")
    train_lm("--out", "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_other_processes_or_parts_may_go_on(train_lm, tmp_path, monkeypatch) -> None:
    train_lm("--out", "whole", "--batch-size", 4)
    stop_at(train_lm, monkeypatch, 3, "--out", "run", "--batch-size", 4)
    assert main(["train", "lm", "--resume", "run", "--accumulate", "2"]) == 0
    whole, run = figures(tmp_path / "whole"), figures(tmp_path / "run")
    assert run["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-4)


def test_another_number_of_threads_is_said(train_lm, tmp_path, monkeypatch) -> None:
    stop_at(train_lm, monkeypatch, 3, "--out", "run")
    with pytest.warns(UserWarning, match="1 processes of 1 threads, now 1 of 2"):
        train_lm("--out", "run", "--threads", 2)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--resume", "nothing"), "holds no run (no options.json)"),
        (("--resume", "run", "--steps", "7"), "the run's own steps 6, not 7"),
        (("--resume", "run", "--out", "x"), "neither --out nor --restart"),
        (("--resume", "run", "--restart"), "neither --out nor --restart"),
    ],
)
def test_what_resume_refuses(train_lm, monkeypatch, capsys, words, match) -> None:
    stop_at(train_lm, monkeypatch, 1, "--out", "run")
    capsys.readouterr()
    assert main(["train", "lm", *words]) == 2
    assert match in capsys.readouterr().err


def test_changed_data_are_refused(train_lm, text, monkeypatch, capsys) -> None:
    stop_at(train_lm, monkeypatch, 1, "--out", "run")
    text.write_text(text.read_text().replace("wrap", "warp"))
    assert train_lm("--out", "run") == 2
    assert "data have changed" in capsys.readouterr().err
    assert train_lm("--out", "run", "--restart") == 0


def test_a_damaged_checkpoint_is_said(train_lm, tmp_path, monkeypatch, capsys) -> None:
    stop_at(train_lm, monkeypatch, 1, "--out", "run")
    path: Path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:999])
    assert train_lm("--out", "run") == 2
    assert "--restart begins anew" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_at_once_in_one_folder(train_lm, tmp_path, capsys) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_lm("--out", "run") == 2
    assert "another process is training in 'run'" in capsys.readouterr().err
    assert train_lm("--out", "run") == 0
