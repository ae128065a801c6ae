"""The verb `choose` as a person meets it: output, errors, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyheads.choose import measure as measure_module
from manyheads.choose import run as run_module
from manyheads.choose.results import Results
from manyheads.choose.verb import stoppable
from manyheads.cli import main

SMALL = ["--heads", "2", "--head-dim", "8", "--mixers", "gla", "--threads", "1"]


@pytest.fixture
def _known_rate(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "matmul_rate", lambda *a, **k: 1e10)
    monkeypatch.setattr(measure_module, "matmul_rate", lambda *a, **k: 1e10)


@pytest.mark.usefixtures("_known_rate")
def test_report_on_the_terminal(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    words = ["choose", "--length", "32", *SMALL, "--budget", "20s", "--out", str(out)]
    assert main(words) == 0
    shown, said = capsys.readouterr()
    for word in ("workload", "machine", "gla", "softmax", "Recommended:", "fwd+bwd", "a token"):
        assert word in shown
    assert "written: " in shown
    assert "add --data" in said
    assert (out / "results.json").is_file()
    assert (out / "report.html").is_file()
    assert main(words) == 0
    assert "complete; --fresh measures anew" in capsys.readouterr().err


@pytest.mark.usefixtures("_known_rate")
def test_json_alone(tmp_path, capsys) -> None:
    assert main(["choose", "--length", "16", *SMALL, "--json", "--out", str(tmp_path)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["schema"] == 1
    assert values == json.loads((tmp_path / "results.json").read_text())
    assert values["complete"]
    assert {r["mixer"] for r in values["cost"]} == {"gla", "softmax"}


WRONG = [
    (["--mixers", "gls"], "did you mean 'gla'"),
    (["--length", "0"], "length 0"),
    (["--length", "99999999999"], "the largest length that fits is"),
    (["--budget", "0"], "above zero"),
    (["--budget", "soon"], "no duration"),
    (["--phase", "dekode"], "did you mean 'decode'"),
    (["--dtype", "float33"], "did you mean"),
    (["--kv-heads", "3"], "does not divide heads 8"),
    (["--no-causal", "--mixers", "gla"], "causal only"),
    (["--model", "no-such-folder"], "has no config.json"),
    (["--data", "no-such-file"], "does not exist"),
    (["--data", "{tmp}/empty"], "is empty"),
    (["--data", "{tmp}/binary"], "is binary"),
    (["--data", "{tmp}/short"], "too few"),
    (["--length", "16", "--out", "{tmp}/empty"], "cannot be written"),
    (["--length", "16", "--out", "{tmp}/empty/sub"], "cannot be written"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_wrong_input_is_one_line_before_any_work(
    tmp_path, monkeypatch, capsys, words, message
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"text\0more")
    (tmp_path / "short").write_text("a few words")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "measure", None)
    before = sorted(tmp_path.rglob("*"))
    assert main(["choose", *(w.replace("{tmp}", str(tmp_path)) for w in words)]) == 2
    shown, said = capsys.readouterr()
    assert shown == ""
    assert message in said
    assert said.startswith("manyheads choose: ")
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "many"], "argument --length: invalid int value: 'many'"),
        (["--budget", "-5s"], "argument --budget: expected one argument"),
        (["--lenght", "5"], "unrecognized arguments: --lenght"),
    ],
)
def test_words_that_are_no_flags_are_one_line(capsys, words, message) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["choose", *words])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "manyheads.cli", "choose", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_an_error_in_a_process_of_its_own(tmp_path) -> None:
    run = start("--mixers", "softmxa", "--out", str(tmp_path / "out"))
    shown, said = run.communicate(timeout=120)
    assert run.returncode == 2
    assert shown == ""
    assert "did you mean 'softmax'" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_ctrl_c_and_the_same_command_again(tmp_path) -> None:
    words = ["--lengths", "64,128,256,512,1024", *SMALL, "--budget", "60s", "--out", str(tmp_path)]
    run = start(*words)
    _wait_for_units(tmp_path, 4, run)
    run.send_signal(signal.SIGINT)
    shown, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert "Traceback" not in said
    assert "interrupted: " in said
    assert "manyheads choose --lengths" in said
    assert "fwd+bwd" in shown, "the partial report"
    kept = Results.load(tmp_path)
    assert len(kept.measured()) >= 4
    assert not kept.complete

    again = start(*words)
    shown, said = again.communicate(timeout=240)
    assert again.returncode == 0, said
    assert "going on" in said
    whole = Results.load(tmp_path)
    assert whole.complete
    assert [s["end"] for s in whole.sessions] == ["interrupted", "complete"]
    for key, unit in kept.units.items():
        assert whole.units[key] == unit
    assert len(whole.units) == 5 * 4 * 2


def _wait_for_units(folder: Path, count: int, run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        file = folder / "results.json"
        if file.is_file() and len(json.loads(file.read_text())["units"]) >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"{count} units were not measured: {run.communicate()[1]}")


def test_ctrl_c_is_certain() -> None:
    """An interrupt that something swallowed is raised again at the next check."""
    with stoppable() as check:
        check()
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("the signal raises at once")
        with pytest.raises(KeyboardInterrupt):
            check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
